"""A gateway that answers what a test tells it to, with the real playground mounted."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from kimi_demo.server import free_port
from kimi_server.playground import page

CONTEXT: dict[str, Any] = {
    "model": "kimi-linear",
    "max_model_len": 1_048_576,
    "kda_state_bytes": 43_417_600,
    "mla_bytes_per_token": 8_064,
}
USAGE: dict[str, Any] = {
    "prompt_tokens": 131_072,
    "completion_tokens": 212,
    "total_tokens": 131_284,
    "prompt_tokens_details": {"cached_tokens": 98_304},
}


@dataclass
class Reply:
    """What the next chat requests get."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there."])
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    running_usage: bool = False  # usage with each piece, too
    gateway_headers: bool = True
    pause: float = 0.0  # seconds between pieces
    hold_after: int | None = None  # wait for release() after so many pieces
    end: str = "stop"  # or `length`; `drop`: the connection breaks; `silent`: no [DONE]; else an error event's message
    end_code: int = 502
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    error: str = "no"


class FakeGateway:
    """Its routes, what they were asked, and what they answer."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.reply = Reply()
        self.key = ""  # asked of each request where not empty
        self.context: dict[str, Any] | None = dict(CONTEXT)
        self.context_status = 404  # where it has no context
        self.models = ["kimi-linear"]
        self.bodies: list[dict[str, Any]] = []
        self.longest: int = CONTEXT["max_model_len"]
        self.counts: int | None = 70_000  # what it says of a prompt's tokens; None: it does not count
        self.each: float | None = None  # tokens a character, which it then counts up to `longest`, as vLLM does
        self.counted: list[str] = []  # the texts that it was asked to count
        self.headers: list[dict[str, str]] = []
        self.cancelled = threading.Event()  # a client left before its answer was complete
        self.held = threading.Event()
        self.app = FastAPI()
        page.mount_playground(self.app)
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/kimi/context", self._context)
        self.app.add_api_route("/v1/messages/count_tokens", self._count, methods=["POST"])
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])

    def release(self) -> None:
        """Let answers go on that wait at `hold_after`."""
        self.held.set()

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "unknown key"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        cards = [{"id": name, "object": "model", "max_model_len": self.longest} for name in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": cards})

    async def _context(self, request: Request) -> Response:
        answer = (
            JSONResponse(self.context)
            if self.context
            else JSONResponse({"error": {"message": "none"}}, self.context_status)
        )
        return self._refusal(request) or answer

    async def _count(self, request: Request) -> Response:
        body = await request.json()
        self.counted.append(body["messages"][0]["content"])
        if self.counts is None:
            return JSONResponse({"error": {"message": "no such route"}}, 404)
        tokens = self.counts
        if self.each is not None:
            tokens = int(self.each * len(self.counted[-1]))
            if tokens > self.longest:
                message = too_long(self.longest)
                return JSONResponse({"type": "error", "error": {"type": "BadRequestError", "message": message}}, 400)
        return self._refusal(request) or JSONResponse({"input_tokens": tokens})

    async def _chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if refusal := self._refusal(request):
            return refusal
        reply = self.reply
        if reply.status != 200:
            return JSONResponse({"error": {"message": reply.error}}, reply.status, reply.headers)
        ours = {"X-Kimi-Queue-Seconds": "0.25", "X-Kimi-Lane": "long", "X-Kimi-Replica": "0"}
        headers = ours if reply.gateway_headers else {}
        return StreamingResponse(self._events(reply), media_type="text/event-stream", headers=headers)

    async def _events(self, reply: Reply) -> AsyncIterator[bytes]:
        complete = False
        try:
            yield b": keep-alive\n\n"
            yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            for index, piece in enumerate(reply.pieces):
                if index == reply.hold_after:
                    while not self.held.is_set():
                        await asyncio.sleep(0.01)
                so_far = {"prompt_tokens": USAGE["prompt_tokens"], "completion_tokens": index + 1}
                usage = {"usage": so_far} if reply.running_usage else {}
                yield event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}], **usage)
                await asyncio.sleep(reply.pause)
            complete = True
        finally:
            if not complete:
                self.cancelled.set()
        if reply.end == "drop":
            raise ConnectionError("as the test asked")
        if reply.end == "silent":
            return
        if reply.end not in ("stop", "length"):
            yield event(error={"message": reply.end, "code": reply.end_code})
            return
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": reply.end}])
        if reply.usage:
            yield event(choices=[], usage=reply.usage)
        yield b"data: [DONE]\n\n"


def too_long(longest: int) -> str:
    """What vLLM says of a prompt that it reads no further than its longest context, in tokens."""
    return (
        f"This model's maximum context length is {longest} tokens. However, your prompt contains at least "
        f"{longest + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
        f"length of the input prompt. (parameter=input_tokens, value={longest + 1})"
    )


def event(**chunk: Any) -> bytes:
    """A server-sent event with a chat chunk."""
    return f"data: {json.dumps(chunk)}\n\n".encode()


@contextmanager
def serving(gateway: FakeGateway) -> Iterator[FakeGateway]:
    """The gateway on its loopback port, in a thread of this process."""
    port = int(gateway.url.rsplit(":", 1)[1])
    server = uvicorn.Server(uvicorn.Config(gateway.app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        threading.Event().wait(0.01)
    try:
        yield gateway
    finally:
        gateway.release()
        server.should_exit = True
        thread.join()
