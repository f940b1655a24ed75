"""What is read from a replica's response: first token, usage, response id."""

import json
import random
from typing import Any

import pytest

from kimi_server.gateway.upstream.response import UpstreamResponse

SSE = "text/event-stream; charset=utf-8"


def feed(response: UpstreamResponse, *chunks: bytes) -> bytes:
    return b"".join(response.feed(chunk) for chunk in chunks)


def test_comments_are_no_first_token() -> None:
    response = UpstreamResponse(SSE)
    assert response.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert not response.first_token
    assert response.feed(b"data: {") == b""
    assert not response.first_token
    assert response.feed(b"}\n\nda") == b"data: {}\n\n"
    assert response.first_token
    assert response.finish() == b"da"


@pytest.mark.parametrize("kind", ["created", "in_progress", "queued"])
def test_what_the_responses_api_says_before_it_read_the_prompt_is_no_first_token(kind: str) -> None:
    response = UpstreamResponse(SSE)
    event = {"type": f"response.{kind}", "response": {"id": "resp_1"}}
    feed(response, f"event: response.{kind}\ndata: {json.dumps(event)}\n\n".encode())
    assert not response.first_token
    assert response.response_id == "resp_1"
    feed(response, b'event: response.output_text.delta\ndata: {"delta": "x"}\n\n')
    assert response.first_token


def usage_of(response: UpstreamResponse) -> tuple[int | None, int | None, int | None]:
    return response.usage.prompt_tokens, response.usage.cached_tokens, response.usage.completion_tokens


OPENAI = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
RESPONSES = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}}


@pytest.mark.parametrize("usage", [OPENAI, RESPONSES])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("streams", [True, False])
def test_usage(usage: dict[str, Any], compact: bool, streams: bool) -> None:
    body = json.dumps(
        {"text": '"usage": {"prompt_tokens": 1}', "usage": usage, "z": [{"usage": None}, {}]}, indent=None
    )
    body = body.replace('"z": [{"usage": null}, {}]', '"z": []')
    if compact:
        body = json.dumps(json.loads(body), separators=(",", ":"))
    response = UpstreamResponse(SSE if streams else "application/json")
    feed(response, f"data: {body}\n\n".encode() if streams else body.encode())
    response.finish()
    assert usage_of(response) == (9, 2, 4)


def test_usage_is_known_before_the_end_is_passed_on() -> None:
    """A client that has the whole body may go on from it before the connection to the replica has ended."""
    response = UpstreamResponse("application/json")
    body = json.dumps({"id": "resp_1", "text": "{}", "usage": RESPONSES}) + "\n"
    feed(response, body[:30].encode(), body[30:-20].encode())
    assert response.usage.tokens == 0
    response.feed(body[-20:].encode())
    assert response.usage.tokens == 13


def test_usage_of_the_messages_api_comes_in_two_parts() -> None:
    response = UpstreamResponse(SSE)
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "cache_read_input_tokens": 2}}}
    end = {"type": "message_delta", "usage": {"output_tokens": 4}}
    feed(response, *(f"event: x\ndata: {json.dumps(event)}\n\n".encode() for event in (start, end)))
    assert usage_of(response) == (9, 2, 4)


@pytest.mark.parametrize("text", ['"usage": {', '"usage": 3', '"usage": null', '"usage": {"prompt_tokens": "x"}', ""])
def test_no_usage(text: str) -> None:
    response = UpstreamResponse("application/json")
    response.feed(text.encode())
    response.finish()
    assert usage_of(response) == (None, None, None)


def test_a_stream_cut_anywhere_is_the_same_stream() -> None:
    choose = random.Random(1)
    whole = b"".join(b"data: " + json.dumps({"n": n, "t": "\n\n é"}).encode() + b"\n\n" for n in range(50))
    for _ in range(50):
        response, passed, rest = UpstreamResponse(SSE), b"", whole
        while rest:
            size = choose.randint(1, 60)
            ready = response.feed(rest[:size])
            assert not ready or ready.endswith(b"\n\n")
            passed, rest = passed + ready, rest[size:]
        assert passed + response.finish() == whole


def test_an_endless_event_is_not_held_for_ever() -> None:
    response = UpstreamResponse(SSE)
    assert sum(len(response.feed(b"x" * 65536)) for _ in range(64)) > 2 << 20
