"""uvicorn's HTTP/1.1 connection with limits on the size of a header and on the time it takes.

httptools itself rejects malformed headers and ambiguous framing; those get an error body of the API. A request to
upgrade is served without the upgrade (RFC 9110, 7.8); HTTP/1.0 gets no chunked response (RFC 9112, 6.1).
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kimi_server.gateway import headers
from kimi_server.gateway.errors import error_body


def limited_protocol(header_bytes: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn."""

    class Connection(HttpToolsProtocol):
        reading_header = False
        upgrades = False  # the request asks for an upgrade
        header_size = 0  # bytes received of an unfinished header
        timer: asyncio.TimerHandle | None = None
        cycles: tuple[RequestResponseCycle, ...] = ()  # not complete yet; all but the first are pipelined

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            for cycle in self.cycles:  # uvicorn tells the newest alone that the client left
                cycle.disconnected = True
                cycle.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.timer is None and (self.cycle is None or self.cycle.response_complete):
                self._start_timer()
            unfinished = self.reading_header
            self._feed(data)
            if unfinished and self.reading_header:
                self.header_size += len(data)
                if self.header_size > header_bytes:
                    self._too_large()

        def _feed(self, data: bytes) -> None:
            """As uvicorn does; where the parser stops for an upgrade, a new one gets the request without it."""
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
            if self.reading_header:  # later ones are trailers, which are dropped
                super().on_header(name, value.rstrip(b" \t"))  # not part of it (RFC 9110, 5.5)

        def on_headers_complete(self) -> None:
            self.reading_header = False
            self._stop_timer()
            if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > header_bytes:
                self._too_large()
                raise ValueError("the header is too large")  # ends the parsing
            if self.parser.get_http_version() not in ("1.0", "1.1"):
                raise ValueError("another version of HTTP")  # becomes a 400
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("not a proxy")
            self.upgrades = self.parser.should_upgrade()
            if self.upgrades:
                return  # it is parsed again, without the upgrade
            super().on_headers_complete()
            self.cycles = (*(cycle for cycle in self.cycles if not cycle.response_complete), self.cycle)
            if self.parser.get_http_version() == "1.0":
                disable_chunking(self.cycle)

        def on_message_complete(self) -> None:
            if not self.upgrades:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            self._end(400, "The request is not valid HTTP/1.1.")

        def _start_timer(self) -> None:
            self.timer = self.loop.call_later(header_seconds, self._too_slow)

        def _stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _too_large(self) -> None:
            self._end(431, f"The header of the request is larger than {header_bytes} bytes.")

        def _too_slow(self) -> None:
            self._end(408, f"The header of the request did not come within {header_seconds:g} seconds.")

        def _end(self, status: int, message: str) -> None:
            """Send an error and close; only close where the error would get into the response to an earlier request."""
            if self.transport.is_closing():
                return
            cycle = self.cycle
            pipelined = any(cycle is waiting for waiting, _ in self.pipeline)
            unanswered = cycle is not None and not pipelined and cycle.more_body and not cycle.response_started
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


def disable_chunking(cycle: RequestResponseCycle) -> None:
    """End a response of unknown length by closing the connection, instead of sending it in chunks."""
    send, unknown = cycle.send, False

    async def unchunked(message: Any) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            unknown = headers.first(list(message["headers"]), b"content-length") is None
            cycle.chunked_encoding = False if unknown else None
        elif unknown:
            cycle.expected_content_length = len(message.get("body", b""))  # uvicorn compares each part with it
        await send(message)

    cycle.send = unchunked  # type: ignore[method-assign]
