"""A stand-in for a server: an application that answers at once and stamps the events of its streams."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from benchmarks.gateway.process import wait_for
from kimi_demo.server import free_port


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers /health and streams as many events as the body's max_tokens says, each with the time it was sent."""
    if scope["type"] != "http":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body) if 0 < len(body) < 65536 else {}  # a large one would hold up its own streams
    form = b"text/event-stream" if asked.get("stream") else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", form)]})
    for _ in range(asked["max_tokens"] if asked.get("stream") else 0):
        event = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}],"sent":%.7f}\n\n' % time.monotonic()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(0.005)
    await send({"type": "http.response.body", "body": b'{"data":[{"id":"x","max_model_len":9}]}', "more_body": False})


async def arrivals(reply: httpx.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@contextlib.contextmanager
def standing_in() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.gateway.stand_in:app", "--port", str(port)]
    command += ["--log-level", "critical", "--timeout-graceful-shutdown", "1"]  # streams whose reader left
    process = subprocess.Popen(command)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
