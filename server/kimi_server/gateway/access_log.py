"""One JSON line a request: what happened to it, never what it said and never a key."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

CLIENT_LEFT = 499  # the status that nginx made customary


@dataclass
class Entry:
    """What is known of a request so far; times in seconds."""

    id: str
    route: str
    began: float  # of time.monotonic()
    key: str | None = None
    status: int = 500  # until there is another
    tokens: int | None = None  # of the prompt, as estimated until the replica has counted them
    cached: int | None = None
    completion: int | None = None
    lane: str | None = None
    wait: float | None = None
    ttft: float | None = None
    replica: int | None = None
    session: str | None = None
    error: str | None = None
    refused: bool = False  # answered by the gateway itself
    counted: bool = False  # `tokens` is what the replica counted

    def refuse(self, status: int, reason: str) -> None:
        self.status, self.error, self.refused = status, reason, True

    def leave(self) -> None:
        """The client is gone; what it had of an answer, if any, is not complete."""
        self.status, self.error, self.refused = CLIENT_LEFT, "client_left", False

    def count(self, prompt: int, cached: int | None, completion: int | None) -> None:
        self.tokens, self.cached, self.completion, self.counted = prompt, cached, completion, True


def write(entry: Entry, out: TextIO) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {
        "time": now,
        "id": entry.id,
        "key": entry.key,
        "route": entry.route,
        "status": entry.status,
        "tokens": entry.tokens,
        "cached": entry.cached,
        "completion": entry.completion,
        "lane": entry.lane,
        "wait": _rounded(entry.wait),
        "ttft": _rounded(entry.ttft),
        "seconds": _rounded(time.monotonic() - entry.began),
        "replica": entry.replica,
        "session": entry.session,
        "error": entry.error,
    }
    out.write(json.dumps(line, separators=(",", ":")) + "\n")
    out.flush()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
