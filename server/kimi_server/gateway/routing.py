"""Which requests belong together, and which replica holds what they share.

A session is named by X-Session-ID, else by its system prompt and first message, which later turns repeat. Rendezvous
hashing gives every session an order of replicas of its own: when one goes, only its sessions move.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

REMEMBERED = 10_000  # stored responses of a key whose replica is known


def session_of(session_id: str | None, owner: str, opening: bytes | None) -> str | None:
    """The session's name, a hash; None where nothing tells. Sessions of two owners are never one."""
    if session_id is None and opening is None:
        return None
    shared = session_id if session_id is not None else [opening.hex() if opening else ""]
    return blake2b(json.dumps([owner, shared]).encode(), digest_size=12).hexdigest()


def rendezvous(session: str, replicas: Sequence[str]) -> list[int]:
    """Indexes of the replicas, by name, in the order in which the session wants them."""
    score = [blake2b(f"{session} {name}".encode(), digest_size=8).digest() for name in replicas]
    return sorted(range(len(replicas)), key=score.__getitem__)


class StoredResponses:
    """Which replica made a response that vLLM's Responses API may be asked for again; each key's oldest are forgotten.

    A key finds its own alone.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, OrderedDict[str, int]] = {}

    def remember(self, key: str, response_id: str, replica: int) -> None:
        own = self.replicas.setdefault(key, OrderedDict())
        own[response_id] = replica
        if len(own) > REMEMBERED:
            own.popitem(last=False)

    def replica_of(self, key: str, response_id: Any) -> int | None:
        own = self.replicas.get(key)
        return own.get(response_id) if own is not None and isinstance(response_id, str) else None
