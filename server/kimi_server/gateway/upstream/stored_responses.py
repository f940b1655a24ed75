"""Which replica stores which response of the Responses API, and how long the conversation up to it is."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 10_000  # a key
RESPONSES = "/v1/responses"


def referred_to(path: str, fields: dict[str, Any] | None) -> Any:
    """The id of the response to which a request refers, by `fields` of its body or by its path; None if to none."""
    if path == RESPONSES:
        return (fields or {}).get("previous_response_id")
    return path.removeprefix(f"{RESPONSES}/").removesuffix("/cancel") if path.startswith(f"{RESPONSES}/") else None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    replica: int  # its index
    tokens: int  # of its prompt, which holds all earlier turns, and its answer; 0 while not reported


class StoredResponses:
    """What is known of response ids, for each key its own; its oldest are forgotten beyond MAX_RESPONSES.

    vLLM keeps a response in the replica that made it, so a request that refers to one must go there.
    """

    def __init__(self) -> None:
        self._responses: dict[str, OrderedDict[str, StoredResponse]] = {}

    def remember(self, key_id: str, response_id: str, replica: int, tokens: int = 0) -> None:
        """`tokens` of 0 leaves those that were reported before."""
        own = self._responses.setdefault(key_id, OrderedDict())
        if tokens == 0 and response_id in own:
            tokens = own[response_id].tokens
        own[response_id] = StoredResponse(replica, tokens)
        if len(own) > MAX_RESPONSES:
            own.popitem(last=False)

    def find(self, key_id: str, response_id: Any) -> StoredResponse | None:
        """None for an id that this key never got, or of another type than str."""
        own = self._responses.get(key_id)
        return own.get(response_id) if own is not None and isinstance(response_id, str) else None
