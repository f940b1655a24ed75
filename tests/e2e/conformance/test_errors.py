"""Requests that cannot be served: each gets a 4xx that says why, and disturbs nobody."""

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

row = pytest.mark.conformance

HELLO = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 4}
TEXT: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}

# what is wrong -> (body, status, a word that the message must hold)
BAD: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "prompt longer than the model's context": (TEXT | {"prompt": [65] * 1_100_000}, 400, "context length"),
    "chat longer than the model's context": (
        CHAT | {"messages": [{"role": "user", "content": "\U0001f732" * 300_000}]},
        400,
        "context length",
    ),
    "`max_tokens` beyond the model's context": (CHAT | {"max_tokens": 10_000_000}, 400, "max_tokens"),
    "unknown model": (CHAT | {"model": "nobody"}, 404, "nobody"),
    "`max_tokens` is a word": (CHAT | {"max_tokens": "many"}, 400, "max_tokens"),
    "`temperature` is a word": (CHAT | {"temperature": "hot"}, 400, "temperature"),
    "`messages` is a string": (CHAT | {"messages": "hello"}, 400, "messages"),
    "no `messages`": ({"max_tokens": 4}, 400, "messages"),
    "empty `messages`": (CHAT | {"messages": []}, 400, "message"),
    "empty `prompt`": (TEXT | {"prompt": ""}, 400, "prompt"),
    "`max_tokens=-1`": (CHAT | {"max_tokens": -1}, 400, "max_tokens"),
    "`max_tokens=0`": (CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    "`temperature=-1`": (CHAT | {"temperature": -1}, 400, "temperature"),
    "`top_p=2`": (CHAT | {"top_p": 2}, 400, "top_p"),
    "`presence_penalty=-9`": (CHAT | {"presence_penalty": -9}, 400, "presence_penalty"),
    "`n=0`": (CHAT | {"n": 0}, 400, "n must be"),
    "`n=-1`": (CHAT | {"n": -1}, 400, "n must be"),
    "`n=3` where sampling is greedy": (CHAT | {"n": 3, "temperature": 0}, 400, "n must be"),
    "`n=1000000000`": (CHAT | {"n": 1_000_000_000}, 400, "n must be"),
    "`top_logprobs=1000`": (CHAT | {"logprobs": True, "top_logprobs": 1000}, 400, "logprobs"),
    "`seed` of 71 bits": (CHAT | {"seed": 2**70}, 400, "seed"),
    "token id outside the vocabulary": (TEXT | {"prompt": [65, 9_999_999]}, 400, "vocab"),
    "negative token id": (TEXT | {"prompt": [65, -7]}, 400, "prompt"),
    "`logit_bias` of a token that is none": (CHAT | {"logit_bias": {"9999999": 5}}, 400, "logit_bias"),
    "`stop` with ten thousand strings": (CHAT | {"stop": ["x"] * 10_000}, 400, "stop"),
    "`stream_options` without `stream`": (CHAT | {"stream_options": {"include_usage": True}}, 400, "tream"),
    "JSON schema that is none": (CHAT | {"response_format": SCHEMA}, 400, "banana"),
    "`tool_choice` without `tools`": (CHAT | {"tool_choice": "required"}, 400, "tools"),
    "an image": (
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x:y"}}]}]},
        400,
        "multimodal",
    ),
    "broken JSON": (b'{"messages": [{"role": "us', 400, "JSON"),
    "bytes that are no UTF-8": (b"\xff\xfe\x00", 400, "pars"),
    "empty body": (b"", 400, "required"),
    "a JSON list": (b"[]", 400, "body"),
}


@pytest.fixture
def post(http: httpx.Client, model: str) -> Callable[[dict[str, Any] | bytes], httpx.Response]:
    """Sends a body to chat, or to completions where it has a prompt; the model is added."""

    def post(body: dict[str, Any] | bytes) -> httpx.Response:
        if isinstance(body, bytes):
            content, path = body, "chat/completions"
        else:
            path = "completions" if "prompt" in body else "chat/completions"
            content = json.dumps({"model": model} | body).encode()
        return http.post(path, content=content, headers={"content-type": "application/json"})

    return post


def check(response: httpx.Response, status: int, word: str) -> str:
    """The error's message, after checking that it is one error in the API's form and about `word`."""
    assert response.status_code == status, response.text[:500]
    body = response.json()
    message = body["error"]["message"] if "error" in body else body["detail"]
    assert word in message
    assert len(message) < 1000
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("what", [pytest.param(what, id=what, marks=row("bad request", what)) for what in BAD])
def test_bad_request(post: Callable, answer: Callable, what: str) -> None:
    body, status, word = BAD[what]
    message = check(post(body), status, word)
    sentence = " ".join(message.split())
    answer(f"{status}, {sentence if len(sentence) <= 100 else sentence[:100] + ' ...'}")


@row("bad request", "all of these while another request streams: its text does not change")
def test_others_go_on(client: openai.OpenAI, model: str, post: Callable) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "The river", "max_tokens": 250, "temperature": 0}
    alone = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    pieces: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        for chunk in client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
            pieces.append(chunk.choices[0].text)
            begun.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert begun.wait(60)
    assert thread.is_alive()
    for body, status, word in BAD.values():
        if isinstance(body, bytes) or len(json.dumps(body)) < 100_000:
            check(post(body), status, word)
    thread.join(120)
    assert "".join(pieces) == alone


@row("bad request", "a path that is none: 404; GET where POST belongs: 405")
def test_paths(http: httpx.Client) -> None:
    assert http.get("nothing").status_code == 404
    assert http.get("chat/completions").status_code == 405
