"""How many prompt tokens a body holds, before any tokenizer sees it: bytes of text over a learned ratio."""

import re
from dataclasses import dataclass

MEMORY = 0.98  # of what was learned, at each new observation
FIRST_RATIO, FIRST_WEIGHT = 4.0, 256  # bytes a token, and the tokens that this guess counts for
TEMPLATE = 256  # tokens that a chat template adds of its own, at most

WINDOW = 65536  # bytes of JSON that are looked at together
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
NUMBER = re.compile(rb"[0-9][0-9.eE+-]*")
SHORT_ESCAPE = re.compile(rb"\\[^u]", re.DOTALL)
# What stands for a character of one byte, and of two (half of a pair is two of four).
ONE, TWO = re.compile(rb"\\u00[0-7]"), re.compile(rb"\\u(?:0[0-7]|[dD][89a-fA-F])")
NEXT_LIST = re.compile(rb"\]\s*,\s*\[")


@dataclass(frozen=True)
class Size:
    """Of a prompt: bytes of text, token ids given as such, and of how many prompts they are."""

    text: int = 0
    ids: int = 0
    prompts: int = 1

    def __add__(self, other: "Size") -> "Size":
        return Size(self.text + other.text, self.ids + other.ids, max(self.prompts, other.prompts))

    @property
    def most(self) -> int:
        """No tokenizer that works on bytes makes more tokens of it."""
        return self.ids + (self.text + TEMPLATE * self.prompts if self.text else 0)


def measure(json: memoryview, several: bool = True) -> Size:
    """The size of a value of a prompt's field in valid JSON: all strings, names of members too, at any depth.

    `several`: a list of texts, of lists of ids or of conversations is as many prompts, and numbers without objects are
    token ids. Nothing is built but WINDOW bytes at a time.
    """
    text = strings = numbers = objects = lists = further = at = 0
    inside = False  # a string
    while at < len(json):
        window = bytes(json[at : at + WINDOW])
        if inside:
            found = REST_OF_STRING.match(window)
            assert found is not None  # it matches nothing, too
            end = found.end()
            if end == len(window):
                end -= _unfinished(window)
            text += end - _saved(window[:end])
            inside = window[end : end + 1] != b'"'
            at += end if inside else end + 1
            continue
        outside, count = STRING.subn(b"", window)
        outside, begins, rest = outside.partition(b'"')  # one that goes on behind the window
        if begins:
            window = window[: len(window) - _unfinished(rest)]
        inside = bool(begins)
        strings += count + inside
        text += len(window) - len(outside) - 2 * count - inside - _saved(window)
        numbers += len(NUMBER.findall(outside))
        at += len(window)
        if not inside and at < len(json) and NUMBER.match(window, len(window) - 1) and json[at] in b"0123456789.eE+-":
            numbers -= 1  # counted again in the next window
        objects += outside.count(b"{")
        lists += outside.count(b"[")
        further += len(NEXT_LIST.findall(outside))
    if not several or bytes(json[:1]) != b"[":
        return Size(text)
    if objects:
        return Size(text, 0, 1 + further if bytes(json[1:64]).lstrip().startswith(b"[") else 1)
    return Size(text, numbers, max(1, strings + lists - 1))


def _unfinished(text: bytes) -> int:
    """How many bytes at the end of a piece of a string are the beginning of an escape."""
    tail = text[-6:]
    at = tail.rfind(b"\\")
    if at < 0:
        return 0
    before = text[: len(text) - len(tail) + at + 1]
    if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
        return 0  # a backslash that is escaped itself
    escape = tail[at:]
    return len(escape) if escape == b"\\" or (escape[1:2] == b"u" and len(escape) < 6) else 0


def _saved(text: bytes) -> int:
    """How many bytes fewer UTF-8 takes than JSON's escapes."""
    if b"\\" not in text:
        return 0
    text, short = SHORT_ESCAPE.subn(b"", text)
    return short + 3 * text.count(b"\\u") + 2 * len(ONE.findall(text)) + len(TWO.findall(text)) - len(ONE.findall(text))


class Estimator:
    """Bytes of text a token, corrected by the `usage` that replicas report."""

    def __init__(self) -> None:
        self.text = FIRST_RATIO * FIRST_WEIGHT
        self.tokens = float(FIRST_WEIGHT)

    @property
    def ratio(self) -> float:
        return self.text / self.tokens

    def tokens_of(self, size: Size) -> int:
        return max(1, round(size.text / self.ratio) + size.ids)

    def correct(self, size: Size, tokens: int) -> None:
        """Learn that a prompt of this size had `tokens` tokens."""
        if size.text > 0 and tokens > size.ids:
            self.text = MEMORY * self.text + size.text
            self.tokens = MEMORY * self.tokens + tokens - size.ids
