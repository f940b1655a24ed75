"""What the gateway adds to a request and to a streamed token, in front of the stand-in."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.gateway.peers import peer
from benchmarks.gateway.process import gateway
from benchmarks.gateway.stand_in import delays, standing_in


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
                async for seconds in delays(reply):
                    if number:
                        events.append(seconds)
    return {"request": requests, "event": events}


def measure_overhead(logs: Path, peers: Sequence[Path]) -> dict[str, dict[str, list[float]]]:
    """Straight to the stand-in, through the gateway, and through each peer."""
    with standing_in() as url:
        found = {"bare": asyncio.run(overhead(url))}
        with gateway([url], {}, logs) as through:
            found["gateway"] = asyncio.run(overhead(through))
        for program in peers:
            with peer(program, [url], "x", logs) as through:
                found[program.name] = asyncio.run(overhead(through))
    return found
