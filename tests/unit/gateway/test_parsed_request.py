"""What a body asks for: its output limits, the number of completions, and errors of one that is no request."""

import json

import pytest

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.request.parsed_request import parse_request, plain_prompt


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "required"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"a": "\xc3"}', "byte 7 is not UTF-8"),
        (b'{"a": "' + b"x" * 70000 + b'\xc3"}', "byte 70007 is not UTF-8"),
        (b'{"a": ', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": "\x01"}', "not JSON"),
        (b"[]", "object, not array"),
        (b'"x"', "object, not str"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"n":' + b"9" * 10_000 + b"}", "too long"),
        (b'{"n":"' + b"9" * 70_000 + b'"}', "n is longer than"),
    ],
)
def test_bodies_that_are_no_requests(body: bytes, words: str) -> None:
    with pytest.raises(GatewayError) as refused:
        parse_request(body)
    assert refused.value.status == 400
    assert words in refused.value.message


def test_halves_of_surrogate_pairs_are_taken_as_pythons_parser_takes_them() -> None:
    for text in ("a\ud83d", "\ude00b", "\ud83d\ud83d\U0001f600\ude00", "\\\ud83d"):
        parsed = parse_request(json.dumps({"prompt": text, "user": text, "max_tokens": 5}).encode())
        assert parsed.size.text_bytes == len(text.encode(errors="surrogatepass"))
        assert parsed.output_tokens(CHAT_LIMITS, None) == 5
    assert b"\\" not in plain_prompt(json.dumps({"prompt": "a\ud83d"}).encode())


CHAT_LIMITS = ("max_completion_tokens", "max_tokens")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"max_tokens": 5, "max_completion_tokens": 6}', 6),
        (b'{"max_tokens": 5, "max_completion_tokens": null}', 5),
        (b'{"max_tokens": "1000000"}', 1_000_000),
        (b'{"max_tokens": 1e6}', 1_000_000),
        (b'{"max_tokens": 5.0}', 5),
        (b'{"max_tokens": 1, "max_tokens": 7}', 7),
        (b'{"max\\u005ftokens": 7}', 7),
        (b'\xef\xbb\xbf{"max_tokens": 7}', 7),
        (b"{}", 16),
        (b'{"max_tokens": null}', 16),
        # What vLLM answers 400.
        (b'{"max_tokens": 0}', None),
        (b'{"max_tokens": -5}', None),
        (b'{"max_tokens": 1.5}', None),
        (b'{"max_tokens": "many"}', None),
        (b'{"max_tokens": {}}', None),
    ],
)
def test_the_longest_completion(body: bytes, answer: int | None) -> None:
    assert parse_request(body).output_tokens(CHAT_LIMITS, 16) == answer


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        (b"{}", 1),
        (b'{"n": 3}', 3),
        (b'{"n": "3"}', 3),
        (b'{"n": null}', 1),
        (b'{"n": 0}', 1),
        (b'{"n": 2, "prompt": ["a", "b", "c"]}', 6),
    ],
)
def test_how_many_completions(body: bytes, answers: int) -> None:
    assert parse_request(body).completions == answers
