"""What the gateway reads from a replica's response: the first token, the usage, the id of a stored response.

The bytes pass unchanged. A stream is forwarded in whole events, so that one that breaks off never ends in half an event
before the error event.
"""

import json
import re
from typing import Any

COPY_BYTES = 16 << 20  # of a response that is no stream, kept to find its usage
EVENT_BYTES = 1 << 20  # of an incomplete event that are held back
# Events that hold no token: of the Responses API those before the prefill, and a stream's end.
EARLY = (b"response.created", b"response.in_progress", b"response.queued", b"data: [DONE]")
USAGE = b'"usage":'
RESPONSE_ID = re.compile(rb'"(resp_[A-Za-z0-9_-]{1,128})"')  # the first in a response is its own
HEAD_BYTES = 4096  # of a response that is no stream, in which its id is searched


class Usage:
    """Token counts as the response reports them, in any of the three APIs' fields; None where it does not."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Of prompt and completion; 0 where no prompt is reported."""
        return 0 if self.prompt_tokens is None else self.prompt_tokens + (self.completion_tokens or 0)

    def read(self, text: bytes | bytearray) -> None:
        """Update the counts from the last usage object in a part of JSON.

        Generated text cannot forge one: within a string its quotes are escaped.
        """
        at = text.rfind(USAGE)
        if at < 0:
            return
        try:
            found, _ = json.JSONDecoder().raw_decode(text[at + len(USAGE) :].decode(errors="replace").lstrip())
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        self.prompt_tokens = _count(found, "prompt_tokens", "input_tokens", self.prompt_tokens)
        self.completion_tokens = _count(found, "completion_tokens", "output_tokens", self.completion_tokens)
        self.cached_tokens = _count(found, "cache_read_input_tokens", "cached_tokens", self.cached_tokens)
        for details in ("prompt_tokens_details", "input_tokens_details"):
            if isinstance(found.get(details), dict):
                self.cached_tokens = _count(found[details], "cached_tokens", "cached_tokens", self.cached_tokens)


def _count(found: dict[str, Any], name: str, other: str, known: int | None) -> int | None:
    value = found.get(name, found.get(other))
    return value if isinstance(value, int) else known


class UpstreamResponse:
    """One response in transit: `feed` takes what arrives and returns what may be forwarded."""

    def __init__(self, content_type: str) -> None:
        self.is_stream = content_type.startswith("text/event-stream")
        self.usage = Usage()
        self.first_token = False  # has arrived, or an error in its place
        self.events = 0  # of a stream, from the first token on; each holds a token or more
        self.complete = False
        self.response_id: str | None = None  # of the Responses API
        self.buffer = bytearray()  # an incomplete event, or the copy of a response that is no stream

    def feed(self, chunk: bytes) -> bytes:
        if not self.is_stream:
            self.first_token = True
            if len(self.buffer) + len(chunk) <= COPY_BYTES:
                self.buffer += chunk
            self._find_response_id(self.buffer[:HEAD_BYTES])
            if chunk.rstrip().endswith(b"}"):  # the end, perhaps, and then the client may go on from it at once
                self.usage.read(self.buffer)
            return chunk
        self.buffer += chunk
        end = max(self.buffer.rfind(mark) + len(mark) if mark in self.buffer else 0 for mark in (b"\n\n", b"\r\n\r\n"))
        if end == 0 and len(self.buffer) > EVENT_BYTES:
            end = len(self.buffer)
        ready = bytes(self.buffer[:end])
        del self.buffer[:end]
        self._scan(ready)
        return ready

    def finish(self) -> bytes:
        """Call at the regular end of the response; returns what was held back of a stream."""
        rest = bytes(self.buffer)
        self._scan(rest)
        self.complete = True
        return rest if self.is_stream else b""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, as reported; where that is not the last word at least as many as events arrived."""
        reported = self.usage.completion_tokens
        return reported if self.complete and reported is not None else max(reported or 0, self.events)

    def _scan(self, text: bytes) -> None:
        if self.is_stream:
            self.events += sum(
                line.startswith(b"data:") and not any(name in line for name in EARLY) for line in text.splitlines()
            )
            self.first_token |= self.events > 0
        self._find_response_id(text)
        if USAGE in text:
            self.usage.read(text)

    def _find_response_id(self, text: bytes | bytearray) -> None:
        if self.response_id is None and (found := RESPONSE_ID.search(text)):
            self.response_id = found[1].decode()
