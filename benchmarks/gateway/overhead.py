"""What the gateway adds to a request and to a streamed token, in front of the stand-in."""

import asyncio
import json
import time
from pathlib import Path

import httpx

from benchmarks.gateway.process import gateway
from benchmarks.gateway.stand_in import arrivals, standing_in


async def overhead(url: str) -> dict[str, list[float]]:
    """Seconds of whole requests, and from the sending of a streamed event to its arrival."""
    chat = {"model": "x", "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 400}
    requests, events = [], []
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        for number in range(1100):
            begun = time.perf_counter()
            (await client.post("/v1/chat/completions", json=chat)).raise_for_status()
            if number >= 100:
                requests.append(time.perf_counter() - begun)
        for number in range(6):
            async with client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as reply:
                async for line in arrivals(reply):
                    if number:
                        events.append(time.monotonic() - json.loads(line)["sent"])
    return {"request": requests, "event": events}


def measure_overhead(logs: Path) -> dict[str, dict[str, list[float]]]:
    with standing_in() as url, gateway([url], {}, logs) as through:
        return {"bare": asyncio.run(overhead(url)), "gateway": asyncio.run(overhead(through))}
