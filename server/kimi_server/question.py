"""What a request's body tells before it is passed on: how long its prompt is, which session it belongs to."""

import codecs
import json
from dataclasses import dataclass
from typing import Any

from kimi_server.errors import Refusal
from kimi_server.estimate import measure

# In this order where a request gives several; the APIs' names for the longest answer.
ANSWER_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Question:
    """`text` and `ids` are the prompt's bytes of text and its token ids; `answer` the most tokens asked for."""

    body: dict[str, Any]
    text: int
    ids: int
    answer: int


def read_question(body: bytes) -> Question:
    """A JSON object, or a Refusal that says what else it is. vLLM gets the bytes, not what was read here."""
    if not body:
        raise _bad("A request body is required: send a JSON object.")
    try:
        found = json.loads(body.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise _bad(f"The request body cannot be parsed: byte {error.start} is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _bad(f"The request body is not JSON: {error.msg} at character {error.pos}.") from None
    except (RecursionError, ValueError):
        raise _bad("The request body is JSON that is nested too deeply or holds a number that is too long.") from None
    if not isinstance(found, dict):
        raise _bad(f"The request body must be a JSON object, not {type(found).__name__}.")
    text, ids = measure(found)
    asked = (found[name] for name in ANSWER_FIELDS if isinstance(found.get(name), int))
    return Question(found, text, ids, max(0, next(asked, 0)))


def _bad(message: str) -> Refusal:
    return Refusal(400, "body", message)
