"""What large bodies do to the streams of others."""

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway.process import gateway
from benchmarks.gateway.stand_in import delays, standing_in

LARGE = {8: 4, 64: 2}  # MiB: how many at once
ALONE = 400  # events of the stream before those come
PIECES = {"objects": b"{}", "texts": b'""', "numbers": b"1234567"}


def post(url: str, body: bytes) -> float:
    begun = time.monotonic()
    reply = httpx.post(f"{url}/v1/chat/completions", content=body, trust_env=False, timeout=300)
    if reply.status_code != 200:  # httpx's own error does not survive the way between two processes
        raise RuntimeError(f"{reply.status_code}: {reply.text[:200]}")
    return time.monotonic() - begun


async def ways_beside(url: str, body: bytes, count: int) -> dict[str, Any]:
    """The longest way of a stream's event in seconds, alone and beside bodies, and until the last of those is answered.

    Events are sent 5 ms apart, so where one takes longer this is the gap in the stream.
    """
    chat = {"model": "x", "messages": [], "max_tokens": 1 << 20, "stream": True}
    loop, ways = asyncio.get_running_loop(), list[float]()
    with ProcessPoolExecutor(count) as senders:
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client,
            client.stream("POST", "/v1/chat/completions", json=chat) as reply,
        ):
            posts: asyncio.Future[list[float]] | None = None
            async for seconds in delays(reply):
                ways.append(seconds)
                if len(ways) == ALONE:
                    posts = asyncio.gather(*(loop.run_in_executor(senders, post, url, body) for _ in range(count)))
                elif posts and posts.done():
                    return {"alone": max(ways[:ALONE]), "way": max(ways[ALONE:]), "answered": max(posts.result())}
    raise RuntimeError("the stream ended before the bodies were answered")


def measure_bodies(logs: Path) -> list[dict[str, Any]]:
    found = []
    with standing_in() as url:
        for size, count in LARGE.items():
            for kind, piece in PIECES.items():
                body = b'{"messages":[' + b",".join([piece] * (((size << 20) - 64) // (len(piece) + 1))) + b"]}"
                with gateway([url], {}, logs) as through:
                    rows = asyncio.run(ways_beside(through, body, count))
                    found.append({"size": size, "count": count, "kind": kind, **rows})
    return found
