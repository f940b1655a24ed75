"""The client's side of one request: header, body, response, disconnect. Every wait has a timeout."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from kimi_server.gateway import headers
from kimi_server.gateway.config.settings import LimitSettings
from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.request.body_budget import BodyBudget, BodyReservation

RETRY_SECONDS = 5
QUERY = re.compile(rb"[!-~]*")


class ClientDisconnected(Exception):
    """The client closed its connection, or stopped to read the response."""


class Client:
    """One request's header, and its ASGI channels.

    `body_complete`: nothing of the request is still to come. `response_started`, `response_ended`: its head, its last
    byte has been sent.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: LimitSettings) -> None:
        # A copy: trailers, which arrive after the body, may not add to the header.
        self.headers: headers.Headers = list(scope["headers"])
        self.query: bytes = scope["query_string"]
        self.limits = limits
        self.body_complete = self.response_started = self.response_ended = False
        self.reservation: BodyReservation | None = None
        self._receive, self._send = receive, send

    def header(self, name: bytes) -> str | None:
        return headers.first(self.headers, name)

    @property
    def api_key(self) -> str | None:
        return headers.api_key(self.headers)

    def check(self) -> None:
        """Raise GatewayError for ambiguous framing, a body announced as too large, or a query of other bytes."""
        headers.check_framing(self.headers, self.limits.body_bytes)
        if not QUERY.fullmatch(self.query):
            message = "The query of this URL has bytes that are not printable ASCII: write them as %XX."
            raise GatewayError(400, "query", message)

    async def read_body(self, budget: BodyBudget) -> bytes:
        """The whole body.

        Raises GatewayError for one that is too large, too slow or finds no room in `budget`; ClientDisconnected.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                size = headers.expected_body_bytes(self.headers, self.limits.body_bytes)
                self.reservation = await budget.reserve(size)
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    body += message.get("body", b"")
                    if len(body) > self.limits.body_bytes:
                        raise headers.too_large(self.limits.body_bytes)
                    if not message.get("more_body"):
                        self.body_complete = True
                        self.reservation.shrink(len(body))
                        return bytes(body)
        except TimeoutError:
            seconds = self.limits.body_seconds
            if self.reservation is None:
                full = f"The gateway had no room for this body within {seconds:g} seconds: try again."
                raise GatewayError(503, "bodies_bytes", full, RETRY_SECONDS) from None
            raise GatewayError(408, "body_seconds", f"The body did not come within {seconds:g} seconds.") from None

    def release_body(self) -> None:
        """Give back the reserved memory of a body that is no longer needed."""
        if self.reservation is not None:
            self.reservation.release()

    async def run_until_disconnect(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` once the body is read; when the client closes its connection, cancel it.

        Raises what `work` raises, and ClientDisconnected where the response was not complete.
        """

        async def disconnected() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass

        working, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.wait({working, leaving})
        if not working.cancelled():
            working.result()
        elif not self.response_ended:
            raise ClientDisconnected

    async def start(self, status: int, fields: headers.Headers) -> None:
        """Send the response's status and header."""
        self.response_started = True
        await self._send_message({"type": "http.response.start", "status": status, "headers": fields})

    async def write(self, content: bytes, more: bool = True) -> None:
        """Send a part of the response's body; raises ClientDisconnected where it stays unread for too long."""
        await self._send_message({"type": "http.response.body", "body": content, "more_body": more})
        self.response_ended = not more

    async def _send_message(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientDisconnected from None
