"""The size of a prompt in a body, and the estimate of its tokens."""

import json
import random
from typing import Any

import pytest

from kimi_server.gateway.request import prompt_size
from kimi_server.gateway.request.parsed_request import parse_request
from kimi_server.gateway.request.prompt_size import PromptSize, measure
from kimi_server.gateway.request.token_estimator import TokenEstimator


@pytest.mark.parametrize(
    ("body", "text", "ids", "prompts"),
    [
        ({"prompt": "abcd"}, 4, 0, 1),
        ({"prompt": "é\\\n😀"}, 8, 0, 1),
        ({"prompt": [1, 2, 3]}, 0, 3, 1),
        ({"prompt": [[1, 2], [3]]}, 0, 3, 2),
        ({"prompt": ["ab", "c"]}, 3, 0, 2),
        ({"prompt": "[1, 2]"}, 6, 0, 1),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]}, 127, 0, 1),
        ({"messages": [[{"role": "user"}], [{"role": "user"}, {"role": "b"}]]}, 21, 0, 2),
        ({"system": "abc", "messages": []}, 3, 0, 1),
        ({"messages": [], "chat_template_kwargs": {"tools": [{"name": "bc"}]}}, 11, 0, 1),
        ({"state": {"a": "bc"}, "questions": {"q": {"type": "t"}}}, 9, 0, 1),
        ({"model": "m", "user": "somebody", "stop": ["a"]}, 0, 0, 1),
        ({"messages": None, "prompt": True, "tools": [1, 2]}, 0, 0, 1),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_size_of_a_prompt(body: dict[str, Any], text: int, ids: int, prompts: int, ascii_only: bool) -> None:
    assert parse_request(json.dumps(body, ensure_ascii=ascii_only).encode()).size == PromptSize(text, ids, prompts)


@pytest.mark.parametrize("window", [7, 16, 33, 65536])
def test_a_size_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Of random values, with strings, escapes and numbers cut anywhere."""
    monkeypatch.setattr(prompt_size, "WINDOW", window)
    choose = random.Random(window)
    letters = ["a", '"', "\\", "\n", "é", "中", "😀", "u", "\\u0041", "[", "{", "}", ",", "7"]

    def value(depth: int = 0) -> Any:
        text = "".join(choose.choices(letters, k=choose.randrange(12)))
        kind = choose.randrange(5 if depth < 4 else 2)
        if kind < 2:
            return text
        few = range(choose.randrange(4))
        return {f"{text}{n}": value(depth + 1) for n in few} if kind == 2 else [value(depth + 1) for _ in few]

    def text_of(found: Any) -> int:
        if isinstance(found, dict):
            return sum(len(name.encode()) + text_of(one) for name, one in found.items())
        return len(found.encode()) if isinstance(found, str) else sum(map(text_of, found))

    for number in range(2000):
        found = value()
        written = json.dumps(found, ensure_ascii=number % 2 == 0).encode()
        assert measure(memoryview(written)).text_bytes == text_of(found), written
    ids = list(range(3000))
    assert measure(memoryview(json.dumps(ids).encode())) == PromptSize(0, 3000, 1)
    assert measure(memoryview(json.dumps([ids, ids]).encode())).token_ids == 6000


def test_the_estimate_follows_the_usage() -> None:
    estimator = TokenEstimator()
    assert estimator.estimate(PromptSize(4000)) == 1000
    assert estimator.estimate(PromptSize(4000, 7)) == 1007
    assert estimator.estimate(PromptSize()) == 1
    for _ in range(50):
        estimator.observe(PromptSize(2000, 10), 1010)
    assert 1950 <= estimator.estimate(PromptSize(4000)) <= 2000
    ratio = estimator.bytes_per_token
    estimator.observe(PromptSize(0, 10), 10)
    estimator.observe(PromptSize(100, 10), 5)  # nonsense
    assert estimator.bytes_per_token == ratio


@pytest.mark.parametrize("window", [7, 16, 33, 65536])
@pytest.mark.parametrize("space", [0, 1, 70, 100_000])
def test_conversations_are_counted_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch, window: int, space: int
) -> None:
    monkeypatch.setattr(prompt_size, "WINDOW", window)
    between = b" " * space
    one = between + b"[" + between + b'{"a": [1, 2]}' + between + b"]" + between
    assert measure(memoryview(b"[" + b",".join([one] * 5) + b"]")).prompts == 5
