"""What a request's body tells before it is passed on: how long its prompt is, what answer it asks for, its session.

vLLM gets the bytes, not what was read here. Nothing but a few small values is built of a body: a prompt of 8 MiB in
small objects would take 200 MiB of them. The work still takes up to 80 ms a MiB, so `reader.py` says where it is done.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from pydantic import BaseModel, ValidationError

from kimi_server.gateway.errors import Refusal
from kimi_server.gateway.request.prompt_size import STRING, WINDOW, Size, measure

# What the engine reads of a body; the rest are parameters.
PROMPT_FIELDS = (
    *("messages", "prompt", "input", "system", "instructions", "tools", "suffix", "documents", "state", "questions"),
)
SEVERAL = ("messages", "prompt")  # lists of them are several prompts
SMALL_FIELDS = (
    *("max_completion_tokens", "max_tokens", "max_output_tokens", "n"),
    *("previous_response_id", "cache_salt", "request_id"),
)
SMALL_BYTES = 65536  # of such a value, and of a conversation's opening
FIRST = 4096  # bytes of a prompt without messages that name its session
PLAIN_BYTES = 8 << 20  # of prompts that are put together as plain text

Raw = msgspec.Raw
ABSENT = Raw(b"")


class Message(msgspec.Struct):
    role: str = ""


MESSAGE = msgspec.json.Decoder(Message)
# Unknown fields are checked and skipped; of a field that stands twice the last counts, as it does for Python's parser.
ENVELOPE = msgspec.json.Decoder(
    msgspec.defstruct("Envelope", [(name, Raw, ABSENT) for name in (*PROMPT_FIELDS, *SMALL_FIELDS)])
)
LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[][{},]', re.DOTALL)


class Asked(BaseModel):
    """How long an answer is asked for, and how many: as lax as vLLM's own models, where "5" and 5.0 are 5."""

    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = 1


@dataclass(frozen=True)
class Question:
    """`body` holds the small fields that were given, `opening` is a hash of how a conversation begins."""

    body: dict[str, Any]
    size: Size
    opening: bytes | None

    def answer(self, fields: Sequence[str], default: int | None) -> int | None:
        """The most tokens of one answer by the first of `fields` that says it; None: all that the context leaves.

        None, too, for a value that vLLM refuses: it is passed on to be refused there, and never counts as nothing.
        """
        if not any(name in self.body for name in fields):
            return default
        asked = self._asked()
        found = (value for name in fields if (value := getattr(asked, name)) is not None)
        answer = next(found, 0)
        return answer if answer > 0 else None

    @property
    def answers(self) -> int:
        return max(1, self._asked().n or 1) * self.size.prompts

    def _asked(self) -> Asked:
        given = {name: self.body[name] for name in Asked.model_fields if name in self.body}
        try:
            return Asked.model_validate(given)
        except ValidationError as error:
            wrong = {one["loc"][0] for one in error.errors(include_url=False)}
            return Asked.model_validate({name: value for name, value in given.items() if name not in wrong})


def read_question(body: bytes) -> Question:
    """A JSON object, or a Refusal that says what else it is."""
    envelope = _open(body)
    small = {}
    for name in SMALL_FIELDS:
        raw = memoryview(getattr(envelope, name))
        if len(raw) > SMALL_BYTES:
            raise _bad(f"{name} is longer than {SMALL_BYTES} bytes: shorten it.")
        if raw:
            try:
                small[name] = json.loads(bytes(raw))
            except (RecursionError, ValueError):
                raise _bad(f"{name} is nested too deeply or holds a number that is too long.") from None
    size = sum((measure(raw, name in SEVERAL) for name, raw in _prompts(envelope)), Size())
    return Question(small, size, _opening(envelope))


def plain_prompt(body: bytes) -> bytes:
    """The text of a prompt alone, as a body for /tokenize; empty where there is more of it than PLAIN_BYTES."""
    envelope = _open(body)
    prompts = [bytes(raw) for _, raw in _prompts(envelope)]
    if sum(map(len, prompts)) > PLAIN_BYTES:
        return b""
    texts = [msgspec.json.decode(text, type=str) for raw in prompts for text in STRING.findall(raw)]
    return msgspec.json.encode({"prompt": "\n".join(texts)})


def _open(body: bytes) -> Any:
    if not body:
        raise _bad("A request body is required: send a JSON object.")
    body = body.removeprefix(codecs.BOM_UTF8)
    _check_utf8(body)
    try:
        try:
            return ENVELOPE.decode(body)
        except msgspec.DecodeError:
            if not LONE_SURROGATE.search(body):
                raise
            return ENVELOPE.decode(_without_lone_surrogates(body))
    except msgspec.ValidationError as error:
        found = str(error).rpartition("got ")[2].strip("`")
        raise _bad(f"The request body must be a JSON object, not {found}.") from None
    except msgspec.DecodeError as error:
        raise _bad(f"The request body is not JSON: {str(error).removeprefix('JSON is malformed: ')}.") from None
    except RecursionError:
        raise _bad("The request body is JSON that is nested too deeply.") from None


def _without_lone_surrogates(body: bytes) -> bytes:
    """As long as before. Python's parser takes halves of pairs, such as an emoji cut in two, and msgspec does not."""
    mended = bytearray(body)
    for found in LONE_SURROGATE.finditer(body):
        mended[found.start() : found.end()] = rb"\ufffd"
    return bytes(mended)


def _check_utf8(body: bytes) -> None:
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body), WINDOW):
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(body[at : at + WINDOW], final=at + WINDOW >= len(body))
        except UnicodeDecodeError as error:
            where = at - waiting + error.start
            raise _bad(f"The request body cannot be parsed: byte {where} is not UTF-8.") from None


def _prompts(envelope: Any) -> Iterator[tuple[str, memoryview]]:
    return ((name, raw) for name in PROMPT_FIELDS if (raw := memoryview(getattr(envelope, name))))


def _opening(envelope: Any) -> bytes | None:
    """A hash of the system prompt and the first message, which later turns repeat; of other prompts' beginnings."""
    given = (bytes(memoryview(getattr(envelope, name))[:SMALL_BYTES]) for name in ("messages", "input", "prompt"))
    prompt = next((raw for raw in given if raw.strip(b'"[]{} \t\r\n') not in (b"", b"null", b"false", b"0")), None)
    if prompt is None:
        return None
    found = blake2b(digest_size=16)
    for name in ("system", "instructions"):
        found.update(bytes(memoryview(getattr(envelope, name))[:SMALL_BYTES]) + b"\0")
    for element in elements(prompt) if prompt.startswith(b"[") else [prompt[:FIRST]]:
        if not element.startswith(b"{"):
            found.update(element[:FIRST] if element.startswith((b'"', b"[")) else prompt[:FIRST])
            break
        found.update(element + b"\0")
        try:
            if MESSAGE.decode(element).role not in ("system", "developer"):
                break
        except msgspec.DecodeError:
            break
    return found.digest()


def elements(array: bytes) -> Iterator[bytes]:
    """The elements of a JSON array, of which the end may be missing."""
    depth, start = 0, 1
    for token in TOKEN.finditer(array):
        match token[0]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
        if depth == 0 or (depth == 1 and token[0] == b","):
            yield array[start : token.start()].strip()
            start = token.end()
        if depth == 0:
            return
    yield array[start:].strip()


def _bad(message: str) -> Refusal:
    return Refusal(400, "body", message)
