"""uvicorn's HTTP connection with two limits more: how large a header may be, and how long it may take.

httptools itself refuses malformed headers and ambiguous framing; what it refuses gets an answer in the API's form.
"""

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kimi_server.errors import error_body


def limited(header_bytes: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """The protocol class to give to uvicorn."""

    class Connection(HttpToolsProtocol):
        reading_header = False
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
            super().data_received(data)
            if unfinished and self.reading_header:
                self.header_size += len(data)
                if self.header_size > header_bytes:
                    self._too_large()

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
            super().on_headers_complete()

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
