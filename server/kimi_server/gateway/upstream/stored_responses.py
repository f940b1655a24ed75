"""Which replica stores which response of the Responses API."""

from collections import OrderedDict
from typing import Any

MAX_RESPONSES = 10_000  # a key


class StoredResponses:
    """The replicas of response ids, for each key its own; its oldest are forgotten beyond MAX_RESPONSES.

    vLLM keeps a response in the replica that made it, so a request that refers to one must go there.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, OrderedDict[str, int]] = {}

    def remember(self, key_id: str, response_id: str, replica: int) -> None:
        own = self._replicas.setdefault(key_id, OrderedDict())
        own[response_id] = replica
        if len(own) > MAX_RESPONSES:
            own.popitem(last=False)

    def replica_of(self, key_id: str, response_id: Any) -> int | None:
        """The index of the replica; None for an id that this key never got, or of another type than str."""
        own = self._replicas.get(key_id)
        return own.get(response_id) if own is not None and isinstance(response_id, str) else None
