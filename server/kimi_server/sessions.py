"""Which requests belong together, and which replica holds what they share.

A session is named by X-Session-ID, else by its system prompt and first message, which later turns repeat. Rendezvous
hashing gives every session an order of replicas of its own: when one goes, only its sessions move.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

REMEMBERED = 10_000  # stored responses whose replica is known


def session_of(session_id: str | None, key: str, opening: bytes | None) -> str | None:
    """The session's name, a hash; None where nothing tells. Sessions of two keys are never one."""
    if session_id is None and opening is None:
        return None
    shared = session_id if session_id is not None else [opening.hex() if opening else ""]
    return blake2b(json.dumps([key, shared]).encode(), digest_size=12).hexdigest()


def rendezvous(session: str, replicas: Sequence[str]) -> list[int]:
    """Indexes of the replicas, by name, in the order in which the session wants them."""
    score = [blake2b(f"{session} {name}".encode(), digest_size=8).digest() for name in replicas]
    return sorted(range(len(replicas)), key=score.__getitem__)


class StoredResponses:
    """Which replica made a response that vLLM's Responses API may be asked for again; the oldest are forgotten."""

    def __init__(self) -> None:
        self.replicas: OrderedDict[str, int] = OrderedDict()

    def remember(self, response_id: str, replica: int) -> None:
        self.replicas[response_id] = replica
        if len(self.replicas) > REMEMBERED:
            self.replicas.popitem(last=False)

    def replica_of(self, response_id: Any) -> int | None:
        return self.replicas.get(response_id) if isinstance(response_id, str) else None
