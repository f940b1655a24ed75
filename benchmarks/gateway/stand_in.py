"""A stand-in for a server: an application that answers at once; each word of its streams is the time it was sent."""

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

NAMES = {"id": "chat", "created": 0, "model": "x"}
CHUNK = {**NAMES, "object": "chat.completion.chunk"}
MESSAGE = {"index": 0, "message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
ANSWER = {**NAMES, "object": "chat.completion", "choices": [MESSAGE], "usage": USAGE}
MODELS = {"object": "list", "data": [{"id": "x", "object": "model", "max_model_len": 9}]}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers every request, and a streamed one with as many words as the body's max_tokens says."""
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
    if not asked.get("stream"):
        answer = json.dumps(ANSWER if scope["method"] == "POST" else MODELS).encode()
        await send({"type": "http.response.body", "body": answer})
        return
    for _ in range(asked["max_tokens"]):
        choice = {"index": 0, "delta": {"content": f"{time.monotonic():.7f}"}, "finish_reason": None}
        event = f"data: {json.dumps({**CHUNK, 'choices': [choice]})}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(0.005)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def delays(reply: httpx.Response) -> AsyncIterator[float]:
    """Seconds from the sending of each word to its arrival."""
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if word := choices and choices[0]["delta"].get("content"):
                yield time.monotonic() - float(word)


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
