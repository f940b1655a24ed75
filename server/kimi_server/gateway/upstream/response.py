"""What a replica's answer tells on its way through: the first token, the usage, a stored response's id.

The bytes go on unchanged. A stream is cut at the ends of its events, so that one that breaks off never leaves half an
event before the error that ends it.
"""

import json
import re
from typing import Any

COPY_BYTES = 16 << 20  # of a whole answer kept to look for its usage
EVENT_BYTES = 1 << 20  # of an event not yet ended that is held back
# Events of the Responses API that come before the engine has read the prompt.
EARLY = (b"response.created", b"response.in_progress", b"response.queued")
USAGE = b'"usage":'
RESPONSE_ID = re.compile(rb'"(resp_[A-Za-z0-9_-]{1,128})"')  # an answer's first is its own
HEAD_BYTES = 4096  # of a whole answer, in which its id is looked for


class Usage:
    """Token counts as far as the answer told them; the fields of all three APIs."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None

    def read(self, text: bytes) -> None:
        """Take in the last usage object in a piece of JSON. In strings its quotes are escaped, so none is forged."""
        at = text.rfind(USAGE)
        if at < 0:
            return
        try:
            found, _ = json.JSONDecoder().raw_decode(text[at + len(USAGE) :].decode(errors="replace").lstrip())
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        self.prompt = _count(found, "prompt_tokens", "input_tokens", self.prompt)
        self.completion = _count(found, "completion_tokens", "output_tokens", self.completion)
        self.cached = _count(found, "cache_read_input_tokens", "cached_tokens", self.cached)
        for details in ("prompt_tokens_details", "input_tokens_details"):
            if isinstance(found.get(details), dict):
                self.cached = _count(found[details], "cached_tokens", "cached_tokens", self.cached)


def _count(found: dict[str, Any], name: str, other: str, known: int | None) -> int | None:
    value = found.get(name, found.get(other))
    return value if isinstance(value, int) else known


class Answer:
    """One answer on its way. `feed` takes what came and returns what may go on."""

    def __init__(self, content_type: str) -> None:
        self.streams = content_type.startswith("text/event-stream")
        self.usage = Usage()
        self.began = False  # the first token is there, or an error in its place
        self.events = 0  # of a stream, from the first token on: a token each, or more
        self.ended = False
        self.response_id: str | None = None  # where it is of the Responses API
        self.held = bytearray()  # the event that has not ended, or the copy of a whole answer

    def feed(self, chunk: bytes) -> bytes:
        if not self.streams:
            self.began = True
            if len(self.held) + len(chunk) <= COPY_BYTES:
                self.held += chunk
            self._look_for_id(self.held[:HEAD_BYTES])
            return chunk
        self.held += chunk
        end = max(self.held.rfind(mark) + len(mark) if mark in self.held else 0 for mark in (b"\n\n", b"\r\n\r\n"))
        if end == 0 and len(self.held) > EVENT_BYTES:
            end = len(self.held)
        ready = bytes(self.held[:end])
        del self.held[:end]
        self._look(ready)
        return ready

    def finish(self) -> bytes:
        """What was held back of a stream that ended; to be called at an answer's regular end."""
        rest = bytes(self.held)
        self._look(rest)
        self.ended = True
        return rest if self.streams else b""

    @property
    def completion(self) -> int:
        """Tokens generated: as the replica counted them in the end, as far as they came before that."""
        counted = self.usage.completion or 0
        return counted if self.ended else max(counted, self.events)

    def _look(self, text: bytes) -> None:
        if self.streams:
            self.events += sum(
                line.startswith(b"data:") and not any(name in line for name in EARLY) for line in text.splitlines()
            )
            self.began |= self.events > 0
        self._look_for_id(text)
        if USAGE in text:
            self.usage.read(text)

    def _look_for_id(self, text: bytes | bytearray) -> None:
        if self.response_id is None and (found := RESPONSE_ID.search(text)):
            self.response_id = found[1].decode()
