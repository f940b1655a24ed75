"""Which requests belong together, and which replica holds what they share.

A session is named by X-Session-ID, else by its system prompt and first message, which later turns repeat. Rendezvous
hashing gives every session an order of replicas of its own: when one goes, only its sessions move.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

FIRST = 4096  # characters of a prompt without messages that name its session
REMEMBERED = 10_000  # stored responses of a key whose replica is known


def session_of(session_id: str | None, owner: str, body: dict[str, Any]) -> str | None:
    """The session's name, a hash; None where nothing tells. Sessions of two owners are never one."""
    shared: Any = session_id
    if shared is None:
        messages = body.get("messages") or body.get("input") or body.get("prompt")
        if not messages:
            return None
        system = body.get("system") or body.get("instructions")
        shared = [system, messages[:FIRST] if isinstance(messages, str) else opening(messages)]
    # ASCII escapes: a lone surrogate, which JSON may hold, has no UTF-8.
    return blake2b(json.dumps([owner, shared]).encode(), digest_size=12).hexdigest()


def opening(messages: Any) -> Any:
    """The messages of a conversation up to the first that is no system prompt; token ids up to FIRST."""
    if not isinstance(messages, list):
        return None
    if not isinstance(messages[0], dict):
        first = messages[0]
        return first[:FIRST] if isinstance(first, (str, list)) else messages[:FIRST]
    for count, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
            return messages[:count]
    return messages


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
