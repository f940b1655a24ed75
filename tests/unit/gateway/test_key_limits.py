"""The limits of a key, and what a request is charged."""

import asyncio
import json

import httpx
import pytest

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.keys.keys_file import Key, digest
from kimi_server.gateway.keys.limits import KeyLimiter, TokenBucket
from kimi_server.gateway.upstream import replicas
from tests.support.gateway import bearer
from tests.support.upstream import Upstream

pytestmark = pytest.mark.usefixtures("time_stands")
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def test_requests_a_minute(start, keys_file) -> None:
    gateway = start(Upstream(), keys=keys_file(alice={"requests_per_minute": 2}, bob={}))
    with gateway.client() as client:
        statuses = [
            client.post("/v1/chat/completions", json=CHAT, headers=bearer("alice")).status_code for _ in range(3)
        ]
        assert statuses == [200, 200, 429]
        reply = client.get("/v1/models", headers=bearer("alice"))
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert "alice" in reply.json()["error"]["message"]
        assert client.get("/v1/models", headers=bearer("bob")).status_code == 200


def test_tokens_a_minute_count_what_was_used(start, keys_file) -> None:
    upstream = Upstream(prompt_tokens=500, tokens=700)
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}))
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT, headers=bearer("alice")).status_code == 200
        gateway.until_idle()
        reply = client.post("/v1/chat/completions", json=CHAT, headers=bearer("alice"))
    assert reply.status_code == 429
    assert 1 <= int(reply.headers["retry-after"]) <= 13  # 201 tokens too many, of 1,000 a minute
    assert len(upstream.seen) == 1
    gateway.until_idle()


def test_what_was_refused_costs_nothing(start, keys_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.05)
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}))
    upstream.healthy = False
    gateway.until(lambda: not gateway.gateway.ready, "the replica is down")
    body = {"prompt": [1] * 900}
    with gateway.client() as client:
        for _ in range(5):
            assert client.post("/v1/completions", json=body, headers=bearer("alice")).status_code == 503
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 0


def test_concurrency(start, keys_file) -> None:
    gateway = start(Upstream(held=lambda body: True), keys=keys_file(alice={"concurrency": 1}))
    stream = CHAT | {"stream": True}
    with gateway.client(headers=bearer("alice")) as client:
        with client.stream("POST", "/v1/chat/completions", json=stream) as reply:
            chunks = reply.iter_raw()  # kept: dropping it would close the connection
            next(chunks)
            refused = client.get("/v1/models")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        gateway.until_idle()
        assert client.get("/v1/models").status_code == 200


def test_longest_context(start, keys_file) -> None:
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 1000}))
    with gateway.client(headers=bearer("alice")) as client:
        reply = client.post("/v1/completions", json={"prompt": [1] * 990, "max_tokens": 11})
        assert reply.status_code == 400
        for word in ("alice", "1000", "990", "11"):
            assert word in reply.json()["error"]["message"]
        assert not upstream.seen
        assert client.post("/v1/completions", json={"prompt": [1] * 990, "max_tokens": 10}).status_code == 200


CHAT_PATH = "/v1/chat/completions"
DIGITS = {"messages": [{"role": "user", "content": "9" * 3000}]}


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        (CHAT_PATH, DIGITS, "/tokenize"),
        ("/v1/completions", {"prompt": "中" * 1000}, "/tokenize"),
        ("/v1/messages", DIGITS | {"max_tokens": 1}, "/v1/messages/count_tokens"),
        ("/v1/responses", {"input": [{"role": "user", "content": "9" * 3000}]}, "/tokenize"),
        (f"{CHAT_PATH}/batch", {"messages": [DIGITS["messages"]] * 2}, "/tokenize"),
    ],
)
def test_a_prompt_near_the_longest_context_is_counted(start, keys_file, path: str, body: dict, asked: str) -> None:
    """3,000 bytes that are 2,000 tokens, where the ratio says 750; the count is remembered."""
    upstream = Upstream(counted=2000)
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 1500}, bob={"longest_context": 2010}))
    with gateway.client() as client:
        reply = client.post(path, json=body, headers=bearer("alice"))
        assert reply.status_code == 400
        assert all(word in reply.json()["error"]["message"] for word in ("1500", "2000"))
        assert not upstream.seen
        assert client.post(path, json=body, headers=bearer("bob")).status_code == 200
    assert [seen.path for seen in upstream.counts_asked] == [asked]


def test_a_prompt_far_from_the_longest_context_is_not_counted(start, keys_file) -> None:
    upstream = Upstream(counted=2000)
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 10000}))
    with gateway.client(headers=bearer("alice")) as client:
        assert client.post(CHAT_PATH, json=DIGITS | {"max_tokens": 6000}).status_code == 200
        assert client.post(CHAT_PATH, json=DIGITS).status_code == 200
    assert not upstream.counts_asked
    assert json.loads(upstream.seen[0].body) == DIGITS | {"max_tokens": 6000}
    assert 6000 < json.loads(upstream.seen[1].body)["max_completion_tokens"] <= 7000


def test_where_no_replica_counts_the_estimate_stands(start, keys_file) -> None:
    upstream = Upstream(counted=None, prompt_tokens=750)
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 2000}))
    with gateway.client(headers=bearer("alice")) as client:
        assert client.post(CHAT_PATH, json=DIGITS).status_code == 200
        assert client.post(CHAT_PATH, json={"messages": DIGITS["messages"] * 4}).status_code == 400
    assert len(upstream.seen) == 1


@pytest.mark.parametrize(
    ("more", "sent"),
    [
        ("", ', "max_completion_tokens": 500'),
        (', "n": 4', ', "max_completion_tokens": 125'),
        (', "max_tokens": null', ', "max_completion_tokens": 500'),
        (', "max_tokens": "many"', ""),  # the replica refuses it
        (', "max_tokens": 0', ""),
        (', "max_tokens": -5', ""),
        (', "max_tokens": "500"', ""),
        (', "max_tokens": 5e2', ""),
        (', "max_tokens": 100, "n": "5"', ""),
        (', "max_tokens": "1000000"', None),
        (', "max_tokens": 1e6', None),
        (', "max_completion_tokens": 501', None),
        (', "max_tokens": 101, "n": 5', None),
        (', "n": 501', None),
    ],
)
def test_an_answer_is_bounded_by_the_longest_context(start, keys_file, more: str, sent: str | None) -> None:
    """A prompt of 2,000 tokens and 500 left: the replica is told, where the client does not say it; or 400."""
    upstream = Upstream(counted=2000)
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 2500}))
    body = json.dumps(DIGITS)[:-1] + more + " }\n"
    with gateway.client(headers=bearer("alice")) as client:
        reply = client.post(CHAT_PATH, content=body)
    if sent is None:
        assert reply.status_code == 400 and not upstream.seen
    else:
        assert reply.status_code == 200
        expected = body if not sent else f"{body.rstrip()[:-1]},{sent[2:]}}}\n"
        assert upstream.seen[0].body.decode() == expected


def test_a_completion_without_a_limit_has_sixteen_tokens(start, keys_file) -> None:
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 1000}))
    with gateway.client(headers=bearer("alice")) as client:
        for ids, sent in ((984, None), (990, 10)):
            assert client.post("/v1/completions", json={"prompt": [1] * ids}).status_code == 200
            assert json.loads(upstream.seen[-1].body).get("max_tokens") == sent
        assert client.post("/v1/completions", json={"prompt": [1] * 1000}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": [[1] * 400] * 2, "max_tokens": 101}).status_code == 400
    assert not upstream.counts_asked


def test_what_is_charged_is_what_is_refunded(start, keys_file) -> None:
    """An estimate beyond the context is capped in both: the key has nothing more than before."""
    upstream = Upstream(prompt_tokens=0, tokens=0)
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}), max_model_len=500)
    bucket = gateway.gateway.keyring.limiters["alice"].tokens
    upstream.hold = 0.2
    with gateway.client(headers=bearer("alice")) as client:
        assert client.post("/v1/completions", json={"prompt": [1] * 900}).status_code == 200
    gateway.until_idle()
    assert bucket.used == 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_before_the_first_token_pays_for_the_prompt(start, keys_file, streams: bool) -> None:
    upstream = Upstream(hold=600)
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}))
    body = {"prompt": [1] * 900, "stream": streams}
    gateway.ask_and_leave("/v1/completions", body, lambda: upstream.running == 1, **bearer("alice"))
    gateway.until_idle()
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 900


def test_a_client_that_leaves_later_pays_for_what_came(start, keys_file) -> None:
    upstream = Upstream(tokens=100_000, pace=0.001)
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}))
    body = {"prompt": [1] * 900, "stream": True}
    read = 0
    with (
        gateway.client(headers=bearer("alice")) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        for line in reply.iter_lines():
            read += line.startswith("data:")
            if read >= 50:
                break
    gateway.until_idle()
    assert gateway.gateway.keyring.limiters["alice"].tokens.used > 945


def test_a_client_that_leaves_the_queue_pays_nothing(start, keys_file) -> None:
    upstream = Upstream(hold=600)
    admission = {"prefill_tokens": 300, "short_prompt": 50, "short_reserve": 100}
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 1000}), admission=admission)
    body = {"prompt": [1] * 200}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=gateway.url, headers=bearer("alice"), trust_env=False) as client:

            async def ask(waiting: int) -> "asyncio.Task[httpx.Response]":
                one = asyncio.create_task(client.post("/v1/completions", json=body))
                while len(upstream.seen) < 1 or gateway.gateway.admission.waiting("long") < waiting:
                    await asyncio.sleep(0.005)
                return one

            asked = [await ask(waiting) for waiting in range(3)]
            for one in asked[1:]:  # before the first makes room for them
                one.cancel()
            while gateway.gateway.admission.waiting("long"):
                await asyncio.sleep(0.005)
            asked[0].cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(leave())
    gateway.until_idle()
    assert len(upstream.seen) == 1
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 200  # of the one sent


def test_a_bucket_refills() -> None:
    bucket = TokenBucket()
    bucket.take(60)
    assert bucket.wait(60) == 1
    bucket.updated_at -= 2
    assert bucket.wait(60) == 0
    bucket.take(1000)  # overdrawn
    assert bucket.wait(60) == 999
    bucket.take(-2000)  # a charge that was too high
    assert bucket.wait(60) == 0
    assert bucket.used == 0


def test_running_requests_are_counted() -> None:
    limiter = KeyLimiter(Key("a", digest("x"), concurrency=2))
    with limiter.request(), limiter.request():
        with pytest.raises(GatewayError), limiter.request():
            pass
        assert limiter.running == 2
    assert limiter.running == 0


@pytest.mark.parametrize(("given", "room", "sent"), [(0, 900, 0), (-5, 900, -5), (None, 900, None), (None, 10, 10)])
def test_a_number_that_is_none_is_not_the_rest_of_the_context(start, keys_file, given, room: int, sent) -> None:
    """A completion of 0 tokens scores its prompt; null means 16, as for the replica."""
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 1000}))
    with gateway.client(headers=bearer("alice")) as client:
        body = {"prompt": [1] * (1000 - room), "echo": True, "max_tokens": given}
        assert client.post("/v1/completions", json=body).status_code == 200
    assert json.loads(upstream.seen[0].body)["max_tokens"] == sent


def test_a_stream_that_reports_no_usage_is_charged_by_its_events(start, keys_file) -> None:
    gateway = start(Upstream(usage=False, tokens=500), keys=keys_file(alice={"tokens_per_minute": 1000}))
    with gateway.client(headers=bearer("alice")) as client:
        assert client.post("/v1/completions", json={"prompt": [1] * 10, "stream": True}).status_code == 200
    gateway.until_idle()
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 510


def test_what_a_replica_refuses_the_gateway_costs_nothing(start, keys_file) -> None:
    gateway = start(Upstream(status=401), keys=keys_file(alice={"tokens_per_minute": 1000}))
    with gateway.client(headers=bearer("alice")) as client:
        assert client.post("/v1/completions", json={"prompt": [1] * 900}).status_code == 502
    gateway.until_idle()
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 0
