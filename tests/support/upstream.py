"""A stand-in for `vllm serve`, in this process, that does what a test tells it: slow, silent, broken off."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send


class Background:
    """A uvicorn server in a thread, on a loopback port of its own."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = server
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Background":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server ended at its start"
            self.thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "the server did not stop"


@dataclass
class Seen:
    """A request that arrived upstream."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class Upstream:
    """What the stand-in does, and what it has seen.

    `hold`: seconds before the first token; `tokens` are streamed `pace` seconds apart. `cut_after`: how many tokens
    are sent before the connection breaks, -1 for none and not even the first comment. `held`: whether the answer to a
    request with this body is held before its end, until its client leaves. `go`: no token comes before it is set.
    """

    hold: float = 0.0
    pace: float = 0.0
    tokens: int = 4
    filler: str = ""  # makes events large
    cut_after: int | None = None
    cuts: int = 1 << 30  # how many requests are broken off; the later ones are not
    half_event: bool = False  # break off in the middle of an event
    held: Callable[[dict[str, Any]], bool] = lambda body: False
    go: threading.Event = field(default_factory=_set_event)
    status: int = 200  # of an answer that is not streamed
    healthy: bool = True
    health_seconds: float = 0.0
    prompt_tokens: int = 7
    cached_tokens: int = 3
    usage: bool = True
    counted: int | None = None  # what /tokenize and its like answer; None: they are not there
    counts_asked: list[Seen] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    def transcript(self) -> list[bytes]:
        """The events of a streamed answer."""
        events = [b": keep-alive\n\n"]
        for number in range(self.tokens):
            text = {"choices": [{"index": 0, "delta": {"content": f"w{number} " + self.filler}}]}
            events.append(b"data: " + json.dumps(text).encode() + b"\n\n")
        if self.usage:
            events.append(b"data: " + json.dumps({"choices": [], "usage": self.counts()}).encode() + b"\n\n")
        return [*events, b"data: [DONE]\n\n"]

    def counts(self) -> dict[str, Any]:
        details = {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "prompt_tokens_details": details,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.lifespan(receive, send)
        if scope["path"] == "/health":
            await asyncio.sleep(self.health_seconds)
            return await self.reply(send, 200 if self.healthy else 503, b"")
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        seen = Seen(scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), body)
        if seen.header(b"x-request-id"):  # what a gateway asks on its own account has none
            self.seen.append(seen)
        if scope["path"] == "/v1/models":
            models = {"object": "list", "data": [{"id": "fake", "object": "model", "max_model_len": 1000000}]}
            return await self.reply(send, 200, json.dumps(models).encode())
        if scope["path"] in ("/tokenize", "/v1/messages/count_tokens"):
            self.counts_asked.append(seen)
            if self.counted is None:
                return await self.reply(send, 404, b'{"error":{"message":"?","type":"NotFoundError","code":404}}')
            name = "count" if scope["path"] == "/tokenize" else "input_tokens"
            found = {name: self.counted, "max_model_len": 1000000, "tokens": [1] * self.counted}
            return await self.reply(send, 200, json.dumps(found).encode())
        self.running += 1
        if len(self.seen) > self.cuts:
            self.cut_after = None
        work = asyncio.create_task(self.answer(body, send))
        left = asyncio.ensure_future(receive())  # nothing but a disconnect can come
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.cancelled += 1
        finally:
            self.running -= 1
            work.cancel()
            left.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def lifespan(self, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def answer(self, body: bytes, send: Send) -> None:
        asked: dict[str, Any] = json.loads(body) if body else {}
        if asked.get("stream"):
            head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-upstream", b"yes")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            async for event in self.events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if self.held(asked):
                await asyncio.Event().wait()
            if self.cut_after is None:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if self.held(asked):
            await asyncio.Event().wait()
        await self.first_token()
        choices = [{"index": 0, "message": {"role": "assistant", "content": '"usage":{"prompt_tokens":1}'}}]
        whole = json.dumps({"choices": choices} | ({"usage": self.counts()} if self.usage else {})).encode()
        await self.reply(send, self.status, whole, len(whole) if self.cut_after is None else self.cut_after)

    async def first_token(self) -> None:
        await asyncio.sleep(self.hold)
        while not self.go.is_set():  # set in another thread
            await asyncio.sleep(0.005)

    async def events(self) -> AsyncIterator[bytes]:
        comment, *rest = self.transcript()
        if self.cut_after != -1:
            yield comment
        await self.first_token()
        for number, event in enumerate(rest):
            if self.cut_after is not None and number >= self.cut_after:
                if self.half_event:
                    yield event[: len(event) // 2]
                return
            yield event
            await asyncio.sleep(self.pace)

    async def reply(self, send: Send, status: int, body: bytes, size: int = 1 << 30) -> None:
        """A whole answer, of which only `size` bytes are sent."""
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body[:size], "more_body": size < len(body)})


@contextlib.contextmanager
def serving(*upstreams: Upstream) -> Iterator[list[Background]]:
    """The stand-ins, each on a port of its own."""

    def server(upstream: Upstream) -> uvicorn.Server:
        config = uvicorn.Config(upstream, log_level="critical", access_log=False, timeout_graceful_shutdown=2)
        return uvicorn.Server(config)

    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Background(server(upstream))) for upstream in upstreams]
