"""What the gateway needs to know of a request body: the prompt's size, the output limits, the session.

vLLM gets the original bytes. Only a few small fields are decoded: a prompt of 8 MiB in small objects would take 200 MiB
as Python objects. Parsing still takes up to 80 ms a MiB, so `body_parser.py` moves large bodies to another process.
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

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.request.prompt_size import STRING, WINDOW, PromptSize, measure

# Fields whose text or token ids end up in the prompt; the others are parameters.
PROMPT_FIELDS = (
    *("messages", "prompt", "input", "system", "instructions", "tools", "suffix", "documents", "state", "questions"),
    "chat_template_kwargs",  # the template takes tools and documents from there, too
)
SEVERAL = ("messages", "prompt")  # a list of these is several prompts
SMALL_FIELDS = (
    *("max_completion_tokens", "max_tokens", "max_output_tokens", "n"),
    *("previous_response_id", "cache_salt", "request_id", "kv_transfer_params"),
)
SMALL_BYTES = 65536  # at most, of such a field; and of what the session's hash is taken of
FIRST = 4096  # bytes of a prompt without messages that the session's hash is taken of
PLAIN_BYTES = 8 << 20  # at most, of a prompt that is flattened to plain text

Raw = msgspec.Raw
ABSENT = Raw(b"")


class Message(msgspec.Struct):
    role: str = ""


MESSAGE = msgspec.json.Decoder(Message)
# Unknown fields are checked and skipped; of a duplicate field the last counts, as it does for Python's parser.
ENVELOPE = msgspec.json.Decoder(
    msgspec.defstruct("Envelope", [(name, Raw, ABSENT) for name in (*PROMPT_FIELDS, *SMALL_FIELDS)])
)
LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[][{},]', re.DOTALL)


class OutputFields(BaseModel):
    """The length and number of completions asked for, coerced as vLLM's own models do: "5" and 5.0 are 5."""

    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = 1


@dataclass(frozen=True)
class ParsedRequest:
    fields: dict[str, Any]  # those of SMALL_FIELDS that the body has
    size: PromptSize
    prefix_hash: bytes | None  # of the system prompt and the first message, which later turns repeat

    def output_tokens(self, names: Sequence[str], default: int | None) -> int | None:
        """The longest completion that the request allows, in tokens; None: the rest of the context.

        The first of the fields `names` that is not null counts, `default` if none does. A value that vLLM refuses
        gives None: it is passed on to be refused there, and must not count as no tokens.
        """
        output = self._output_fields()
        for name in names:
            if self.fields.get(name) is not None:
                return max(getattr(output, name) or 0, 0) or None
        return default

    @property
    def completions(self) -> int:
        """How many are asked for: `n` of each prompt."""
        return max(1, self._output_fields().n or 1) * self.size.prompts

    def _output_fields(self) -> OutputFields:
        """Without those that are not valid."""
        given = {name: self.fields[name] for name in OutputFields.model_fields if name in self.fields}
        try:
            return OutputFields.model_validate(given)
        except ValidationError as error:
            invalid = {one["loc"][0] for one in error.errors(include_url=False)}
            return OutputFields.model_validate({name: value for name, value in given.items() if name not in invalid})


def parse_request(body: bytes) -> ParsedRequest:
    """Parse a body; raises GatewayError 400 for one that is not a JSON object."""
    envelope = _decode(body)
    small: dict[str, Any] = {}
    for name in SMALL_FIELDS:
        raw = memoryview(getattr(envelope, name))
        if len(raw) > SMALL_BYTES:
            raise _invalid(f"{name} is longer than {SMALL_BYTES} bytes: shorten it.")
        if raw:
            try:
                small[name] = json.loads(bytes(raw))
            except (RecursionError, ValueError):
                raise _invalid(f"{name} is nested too deeply or holds a number that is too long.") from None
    size = sum((measure(raw, name in SEVERAL) for name, raw in _prompt_fields(envelope)), PromptSize())
    return ParsedRequest(small, size, _prefix_hash(envelope))


def plain_prompt(body: bytes) -> bytes:
    """A body for /tokenize with all text of the prompt, joined; empty for a prompt of more than PLAIN_BYTES."""
    envelope = _decode(body)
    prompts = [bytes(raw) for _, raw in _prompt_fields(envelope)]
    if sum(map(len, prompts)) > PLAIN_BYTES:
        return b""
    texts = [msgspec.json.decode(text, type=str) for raw in prompts for text in STRING.findall(raw)]
    return msgspec.json.encode({"prompt": "\n".join(texts)})


def _decode(body: bytes) -> Any:
    """The body's ENVELOPE: each field as raw JSON. Raises GatewayError 400."""
    if not body:
        raise _invalid("A request body is required: send a JSON object.")
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
        raise _invalid(f"The request body must be a JSON object, not {found}.") from None
    except msgspec.DecodeError as error:
        raise _invalid(f"The request body is not JSON: {str(error).removeprefix('JSON is malformed: ')}.") from None
    except RecursionError:
        raise _invalid("The request body is JSON that is nested too deeply.") from None


def _without_lone_surrogates(body: bytes) -> bytes:
    """The body, of the same length, with U+FFFD in place of unpaired surrogates.

    Python's parser, which vLLM uses, takes them (an emoji cut in two), and msgspec does not.
    """
    replaced = bytearray(body)
    for found in LONE_SURROGATE.finditer(body):
        replaced[found.start() : found.end()] = rb"\ufffd"
    return bytes(replaced)


def _check_utf8(body: bytes) -> None:
    """Raise GatewayError 400 with the place of the first byte that is not UTF-8."""
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body), WINDOW):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(body[at : at + WINDOW], final=at + WINDOW >= len(body))
        except UnicodeDecodeError as error:
            position = at - pending + error.start
            raise _invalid(f"The request body cannot be parsed: byte {position} is not UTF-8.") from None


def _prompt_fields(envelope: Any) -> Iterator[tuple[str, memoryview]]:
    return ((name, raw) for name in PROMPT_FIELDS if (raw := memoryview(getattr(envelope, name))))


def _prefix_hash(envelope: Any) -> bytes | None:
    """A hash of the system prompt and the first message; of a prompt without messages, of its first bytes."""
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
    """The elements of a JSON array, as raw JSON; the array may be cut off at any place."""
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


def _invalid(message: str) -> GatewayError:
    return GatewayError(400, "body", message)
