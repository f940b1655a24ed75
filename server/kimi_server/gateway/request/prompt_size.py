"""The size of a prompt in a JSON body, measured without decoding it: bytes of text and token ids."""

import re
from dataclasses import dataclass

TEMPLATE = 256  # tokens that a chat template adds of its own, at most

WINDOW = 65536  # bytes of JSON that are scanned at a time
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
NUMBER = re.compile(rb"[0-9][0-9.eE+-]*")
SHORT_ESCAPE = re.compile(rb"\\[^u]", re.DOTALL)
# Escapes of a character that UTF-8 writes in one byte, and in two (each half of a surrogate pair: two of four).
ONE, TWO = re.compile(rb"\\u00[0-7]"), re.compile(rb"\\u(?:0[0-7]|[dD][89a-fA-F])")
SPACE = b" \t\r\n"
LISTS = re.compile(rb"\[\s*\[")


@dataclass(frozen=True)
class PromptSize:
    text_bytes: int = 0  # in UTF-8
    token_ids: int = 0  # given as such
    prompts: int = 1  # that both are divided among

    def __add__(self, other: "PromptSize") -> "PromptSize":
        return PromptSize(
            self.text_bytes + other.text_bytes, self.token_ids + other.token_ids, max(self.prompts, other.prompts)
        )

    @property
    def max_tokens(self) -> int:
        """An upper bound: a byte-level tokenizer makes at most one token of a byte."""
        return self.token_ids + (self.text_bytes + TEMPLATE * self.prompts if self.text_bytes else 0)


def measure(json: memoryview, several: bool = True) -> PromptSize:
    """The size of one value in valid JSON: all strings at any depth, member names included.

    `several`: a list of texts, of lists of ids or of conversations is as many prompts, and numbers outside of objects
    are token ids. No more than WINDOW bytes are copied at a time.
    """
    text = strings = numbers = objects = lists = further = at = 0
    inside = False  # of a string
    tail = b""  # of the window before, where another list may follow
    while at < len(json):
        window = bytes(json[at : at + WINDOW])
        if inside:
            found = REST_OF_STRING.match(window)
            assert found is not None  # it matches the empty string, too
            end = found.end()
            if end == len(window):
                end -= _unfinished(window)
            text += end - _saved(window[:end])
            inside = window[end : end + 1] != b'"'
            at += end if inside else end + 1
            continue
        outside, count = STRING.subn(b"", window)
        outside, begins, rest = outside.partition(b'"')  # the rest of a string that goes on in the next window
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
        outside = tail + outside.translate(None, SPACE)
        further += outside.count(b"],[")
        tail = b"" if inside else next((end for end in (b"]", b"],") if outside.endswith(end)), b"")
    if not several or bytes(json[:1]) != b"[":
        return PromptSize(text)
    if objects:
        return PromptSize(text, 0, 1 + further if LISTS.match(json) else 1)
    return PromptSize(text, numbers, max(1, strings + lists - 1))


def _unfinished(text: bytes) -> int:
    """The number of bytes at the end of a part of a string that begin an escape which is not complete."""
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
    """The number of bytes by which JSON's escapes are longer than the UTF-8 of what they stand for."""
    if b"\\" not in text:
        return 0
    text, short = SHORT_ESCAPE.subn(b"", text)
    return short + 3 * text.count(b"\\u") + 2 * len(ONE.findall(text)) + len(TWO.findall(text)) - len(ONE.findall(text))
