"""The access log: one JSON line a request, without any content of it and without keys."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

CLIENT_CLOSED_REQUEST = 499  # as nginx logs it
REFUSED_BY_REPLICA, FAILED_BY_REPLICA = "refused_by_replica", "failed_by_replica"


@dataclass
class AccessLogEntry:
    """What is known of a request so far; times in seconds."""

    request_id: str
    route: str
    started_at: float  # of time.monotonic()
    key_id: str | None = None
    status: int = 500  # until there is another
    prompt_tokens: int | None = None  # estimated, until the replica reports them
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    lane: str | None = None
    queue_seconds: float | None = None
    ttft: float | None = None
    replica: int | None = None
    reading: int | None = None  # tokens of other prompts there, as this one was sent
    running: int | None = None  # other requests there
    session: str | None = None
    error: str | None = None
    rejected: bool = False  # answered by the gateway itself
    usage_reported: bool = False  # `prompt_tokens` is the replica's count

    def reject(self, status: int, reason: str) -> None:
        self.status, self.error, self.rejected = status, reason, True

    def client_left(self) -> None:
        """The client closed its connection before the response was complete."""
        self.status, self.error, self.rejected = CLIENT_CLOSED_REQUEST, "client_left", False

    def replied(self, status: int) -> None:
        """The replica's own status."""
        self.status = status
        if status >= 400:
            self.error = FAILED_BY_REPLICA if status >= 500 else REFUSED_BY_REPLICA

    def report_usage(self, prompt: int, cached: int | None, completion: int | None) -> None:
        """Take over the token counts of the replica."""
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = prompt, cached, completion
        self.usage_reported = True


def write(entry: AccessLogEntry, out: TextIO) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {
        "time": now,
        "id": entry.request_id,
        "key": entry.key_id,
        "route": entry.route,
        "status": entry.status,
        "tokens": entry.prompt_tokens,
        "estimated": entry.prompt_tokens is not None and not entry.usage_reported,
        "cached": entry.cached_tokens,
        "completion": entry.completion_tokens,
        "lane": entry.lane,
        "wait": _rounded(entry.queue_seconds),
        "ttft": _rounded(entry.ttft),
        "seconds": _rounded(time.monotonic() - entry.started_at),
        "replica": entry.replica,
        "reading": entry.reading,
        "running": entry.running,
        "session": entry.session,
        "error": entry.error,
    }
    out.write(json.dumps(line, separators=(",", ":")) + "\n")
    out.flush()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
