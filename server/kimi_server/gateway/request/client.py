"""The client's side of one request: its header, its body, and whether it is still there; every wait has an end."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from kimi_server.gateway import headers
from kimi_server.gateway.config.settings import LimitSettings
from kimi_server.gateway.errors import Refusal
from kimi_server.gateway.request.body_budget import Bodies, Held

RETRY_SECONDS = 5
QUERY = re.compile(rb"[!-~]*")


class ClientLeft(Exception):
    """Nobody is there to answer."""


class Client:
    """`body_read`: nothing of the request is still to come. `started`, `ended`: the answer's head, its end is out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: LimitSettings) -> None:
        # A copy: what arrives after the body may not add to the header.
        self.headers: headers.Headers = list(scope["headers"])
        self.query: bytes = scope["query_string"]
        self.limits = limits
        self.body_read = self.started = self.ended = False
        self.held: Held | None = None
        self._receive, self._send = receive, send

    def header(self, name: bytes) -> str | None:
        return headers.first(self.headers, name)

    @property
    def key(self) -> str | None:
        return headers.presented_key(self.headers)

    def check(self) -> None:
        """Refuse a header that could be read in two ways or goes where no route leads."""
        headers.check_framing(self.headers, self.limits.body_bytes)
        if not QUERY.fullmatch(self.query):
            message = "The query of this URL has bytes that are no visible ASCII: write them as %XX."
            raise Refusal(400, "query", message)

    async def read_body(self, bodies: Bodies) -> bytes:
        """The whole body; raises Refusal where it is too large, too slow or there is no room for it; ClientLeft."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                self.held = await bodies.hold(headers.announced(self.headers, self.limits.body_bytes))
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    body += message.get("body", b"")
                    if len(body) > self.limits.body_bytes:
                        raise headers.too_large(self.limits.body_bytes)
                    if not message.get("more_body"):
                        self.body_read = True
                        self.held.shrink(len(body))
                        return bytes(body)
        except TimeoutError:
            seconds = self.limits.body_seconds
            if self.held is None:
                full = f"There was no room for this body beside others within {seconds:g} seconds: try again."
                raise Refusal(503, "bodies_bytes", full, RETRY_SECONDS) from None
            raise Refusal(408, "body_seconds", f"The body did not come within {seconds:g} seconds.") from None

    def release_body(self) -> None:
        """Give back the room of a body that is no longer needed."""
        if self.held is not None:
            self.held.release()

    async def stays_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, and cancel it when the client closes its connection: ClientLeft. To be used after the body."""

        async def until_left() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass

        working, leaving = asyncio.create_task(work), asyncio.create_task(until_left())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.wait({working, leaving})
        if not working.cancelled():
            working.result()
        elif not self.ended:
            raise ClientLeft

    async def start(self, status: int, fields: headers.Headers) -> None:
        """Send the answer's head."""
        self.started = True
        await self._pass({"type": "http.response.start", "status": status, "headers": fields})

    async def write(self, content: bytes, more: bool = True) -> None:
        """Send a piece of the answer; raises ClientLeft where it is not read for too long."""
        await self._pass({"type": "http.response.body", "body": content, "more_body": more})
        self.ended = not more

    async def _pass(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientLeft from None
