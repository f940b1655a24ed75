"""The `x-ratelimit-` headers of OpenAI, and Retry-After where one is to come later."""

import re

import pytest

from kimi_server.gateway import headers
from kimi_server.gateway.keys.keys_file import Key
from kimi_server.gateway.keys.limits import KeyLimiter
from kimi_server.gateway.keys.rate_limits import NAMES, duration, rate_limit_headers
from tests.support.gateway import CHAT, bearer
from tests.support.upstream import Upstream

pytestmark = pytest.mark.usefixtures("time_stands")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (7.2, "8s"), (360, "6m0s"), (3661.5, "1h1m2s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_left_and_when_all_is() -> None:
    limiter = KeyLimiter(Key("a", "", requests_per_minute=60, tokens_per_minute=6000))
    fresh = rate_limit_headers(limiter)
    assert [*fresh] == NAMES
    assert fresh["x-ratelimit-remaining-requests"] == "60" and fresh["x-ratelimit-reset-requests"] == "0s"
    with limiter.request():
        limiter.charge(900)
    used = rate_limit_headers(limiter)
    assert used["x-ratelimit-limit-requests"] == "60" and used["x-ratelimit-remaining-requests"] == "59"
    assert used["x-ratelimit-limit-tokens"] == "6000"
    assert used["x-ratelimit-remaining-tokens"] == "5100"
    assert used["x-ratelimit-reset-tokens"] == "9s"
    limiter.tokens.take(100_000)
    assert rate_limit_headers(limiter)["x-ratelimit-remaining-tokens"] == "0"


def test_a_limit_that_a_key_has_not_is_not_told() -> None:
    assert rate_limit_headers(KeyLimiter(Key("a", "", concurrency=1))) == {}
    [limit, *_] = rate_limit_headers(KeyLimiter(Key("a", "", tokens_per_minute=5)))
    assert limit == "x-ratelimit-limit-tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_and_refusals_carry_them(start, keys_file, stream: bool) -> None:
    keys = keys_file(alice={"requests_per_minute": 1, "tokens_per_minute": 10_000})
    gateway = start(Upstream(), keys=keys, cors_origins=("*",))
    with gateway.client(headers=bearer("alice") | {"origin": "http://page"}) as client:
        answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        refusal = client.post("/v1/chat/completions", json=CHAT)
        nobody = client.post("/v1/chat/completions", json=CHAT, headers=bearer("eve"))
    assert (answer.status_code, refusal.status_code, nobody.status_code) == (200, 429, 401)
    for reply in (answer, refusal):
        assert [name for name in reply.headers if name.startswith("x-ratelimit-")] == NAMES
        assert {*NAMES} <= {*re.split(r",\s*", reply.headers["access-control-expose-headers"])}
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert not [name for name in nobody.headers if name.startswith("x-ratelimit-")]


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_replica_is_given_time(start, status: int) -> None:
    gateway = start(Upstream(status=status))
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.headers["retry-after"]) == (status, "5")


def test_what_a_replica_says_of_time_stays() -> None:
    said = [(b"Retry-After", b"77")]
    assert headers.to_client(503, said) == [(b"retry-after", b"77")]
    assert headers.to_client(500, []) == []
