"""uvicorn's HTTP connection with two limits more: how large a header may be, and how long it may take.

httptools itself refuses malformed headers and ambiguous framing; what it refuses gets an answer in the API's form.
A request to upgrade is served as if it had not asked (RFC 9110, 7.8), HTTP/1.0 gets no chunks (RFC 9112, 6.1).
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kimi_server.gateway import headers
from kimi_server.gateway.errors import error_body


def limited(header_bytes: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """The protocol class to give to uvicorn."""

    class Connection(HttpToolsProtocol):
        reading_header = False
        upgrades = False  # the request asks for it
        header_size = 0  # of what has come of an unfinished header
        clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            self._start_clock()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.clock is None and (self.cycle is None or self.cycle.response_complete):
                self._start_clock()
            unfinished = self.reading_header
            self._feed(data)
            if unfinished and self.reading_header:
                self.header_size += len(data)
                if self.header_size > header_bytes:
                    self._too_large()

        def _feed(self, data: bytes) -> None:
            """As uvicorn does, but a parser that stops at a wish to upgrade is told the request without it."""
            self._unset_keepalive_if_required()
            while True:
                try:
                    return self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as upgrade:
                    head = self._head_without_upgrade()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    data = head + data[upgrade.args[0] :]
                except httptools.HttpParserError:
                    return self.send_400_response("")

        def _head_without_upgrade(self) -> bytes:
            first = b"%s %s HTTP/%s\r\n" % (
                self.parser.get_method(),
                self.url,
                self.parser.get_http_version().encode(),
            )
            fields = headers.without_upgrade(self.headers)
            return first + b"".join(b"%s: %s\r\n" % field for field in fields) + b"\r\n"

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.reading_header, self.header_size = True, 0

        def on_header(self, name: bytes, value: bytes) -> None:
            if self.reading_header:  # later ones are trailers, which nobody reads
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self.reading_header = False
            self._stop_clock()
            if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > header_bytes:
                self._too_large()
                raise ValueError("the header is too large")  # ends the parsing
            if self.parser.get_http_version() not in ("1.0", "1.1"):
                raise ValueError("another version of HTTP")  # becomes a 400
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("not a proxy")
            self.upgrades = self.parser.should_upgrade()
            if self.upgrades:
                return  # it comes again, without that wish
            super().on_headers_complete()
            if self.parser.get_http_version() == "1.0":
                unchunk(self.cycle)

        def on_message_complete(self) -> None:
            if not self.upgrades:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            self._end(400, "The request is not valid HTTP/1.1.")

        def _start_clock(self) -> None:
            self.clock = self.loop.call_later(header_seconds, self._too_slow)

        def _stop_clock(self) -> None:
            if self.clock is not None:
                self.clock.cancel()
                self.clock = None

        def _too_large(self) -> None:
            self._end(431, f"The header of the request is larger than {header_bytes} bytes.")

        def _too_slow(self) -> None:
            self._end(408, f"The header of the request did not come within {header_seconds:g} seconds.")

        def _end(self, status: int, message: str) -> None:
            """Answer and close; only close where that would get into the answer to an earlier request."""
            if self.transport.is_closing():
                return
            cycle = self.cycle
            unanswered = cycle is not None and cycle.more_body and not cycle.response_started
            if unanswered:  # the request is this one: its application sees a client that left
                cycle.disconnected = True
                cycle.message_event.set()
            if cycle is None or unanswered or cycle.response_complete:
                body = json.dumps(error_body(status, message)).encode()
                head = (
                    f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + body)
            self.transport.close()

    return Connection


def unchunk(cycle: RequestResponseCycle) -> None:
    """Let the end of the connection be the end of an answer whose length is not known."""
    send, unknown = cycle.send, False

    async def unchunked(message: Any) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            unknown = headers.first(list(message["headers"]), b"content-length") is None
            cycle.chunked_encoding = False if unknown else None
        elif unknown:
            cycle.expected_content_length = len(message.get("body", b""))  # what uvicorn holds each piece against
        await send(message)

    cycle.send = unchunked  # type: ignore[method-assign]
