"""What goes through the gateway: bytes unchanged, headers as listed, failures said aloud."""

import json
import socket

import httpx
import pytest

from kimi_demo.server import free_port
from kimi_server.gateway.upstream import replicas
from tests.support.upstream import Upstream

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}
STREAM = CHAT | {"stream": True}


def test_bytes_pass_unchanged(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    body = b'{ "messages" : [{"role":"user","content":"\\u00e9 \xc3\xa9"}] ,\n "temperature": 1.0, "model":"fake"}'
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200
    assert upstream.seen[-1].body == body
    assert upstream.seen[-1].header(b"content-length") == [str(len(body)).encode()]
    assert reply.json()["choices"][0]["message"]["content"] == '"usage":{"prompt_tokens":1}'
    assert reply.headers["x-kimi-lane"] == "short"
    assert reply.headers["x-kimi-replica"] == "0"
    assert float(reply.headers["x-kimi-queue-seconds"]) >= 0


def test_streams_pass_unchanged(start) -> None:
    upstream = Upstream(tokens=20, pace=0.001)
    gateway = start(upstream)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=STREAM) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["x-upstream"] == "yes"
        assert b"".join(reply.iter_raw()) == b"".join(upstream.transcript())
    gateway.until_idle()


def test_only_listed_headers_reach_a_replica(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    sent = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "cookie": "a=b",
        "x-vllm-priority": "-1000",
        "x-data-parallel-rank": "3",
        "x-request-id": "mine",
        "x-forwarded-for": "1.2.3.4",
        "connection": "x-session-id",
        "te": "trailers",
        "traceparent": "00-1-2-03",
        "x-session-id": "abc",
    }
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", json=CHAT, headers=sent)
    [seen] = upstream.seen
    names = {name for name, _ in seen.headers}
    assert not names & {b"authorization", b"x-api-key", b"cookie", b"x-data-parallel-rank", b"x-forwarded-for", b"te"}
    assert seen.header(b"x-vllm-priority") == [b"0"]
    assert seen.header(b"traceparent") == [b"00-1-2-03"]
    assert seen.header(b"x-session-id") == [b"abc"]
    assert seen.header(b"x-request-id") == [reply.headers["x-request-id"].encode()]
    assert reply.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/systemone"])
def test_no_client_chooses_its_priority_in_the_body(start, path: str) -> None:
    """vLLM reads it there, of these two routes alone."""
    upstream = Upstream()
    gateway = start(upstream, admission={"short_prompt": 1000})
    with gateway.client() as client:
        for text, priority in (("x", 0), ("x" * 9000, 1)):
            body = {"messages": [[{"role": "user", "content": text}]], "state": text, "priority": -9}
            assert client.post(path, json=body).status_code == 200
            assert json.loads(upstream.seen[-1].body)["priority"] == priority


def test_a_long_prompt_has_the_lower_priority(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    with gateway.client() as client:
        reply = client.post("/v1/completions", json={"prompt": [1] * 5000})
    assert reply.headers["x-kimi-lane"] == "long"
    assert upstream.seen[-1].header(b"x-vllm-priority") == [b"1"]


def test_the_rank_of_a_replica_is_sent(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    gateway.gateway.replicas.all[0].rank = 2
    with gateway.client() as client:
        client.post("/v1/chat/completions", json=CHAT)
    assert upstream.seen[-1].header(b"x-data-parallel-rank") == [b"2"]


def test_the_client_leaves_and_the_replica_learns(start) -> None:
    upstream = Upstream(tokens=10_000, pace=0.01)
    gateway = start(upstream)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=STREAM) as reply:
        chunks = reply.iter_raw()  # kept: dropping it would close the connection
        next(chunks)
        assert upstream.running == 1
    gateway.until(lambda: upstream.cancelled == 1, "the replica noticed")
    gateway.until_idle()
    assert gateway.lines[-1]["status"] == 499


def test_the_client_leaves_before_the_first_token(start) -> None:
    upstream = Upstream(held=lambda body: True)
    gateway = start(upstream)
    body = json.dumps(CHAT).encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        gateway.until(lambda: upstream.running == 1, "the replica has the request")
    gateway.until(lambda: upstream.cancelled == 1, "the replica noticed")
    gateway.until_idle()


@pytest.mark.parametrize("half_event", [False, True])
def test_a_broken_stream_ends_with_an_error_event(start, half_event: bool) -> None:
    upstream = Upstream(tokens=9, cut_after=3, half_event=half_event)
    gateway = start(upstream)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=STREAM) as reply:
        text = reply.read().decode()  # ends regularly
    events = [event for event in text.split("\n\n") if event.startswith("data: ")]
    assert len(events) == 4
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events[:3])
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == 502
    assert "lost" in error["message"]
    gateway.until_idle()
    assert gateway.lines[-1]["error"] == "replica_lost"


def test_a_broken_stream_of_messages_names_its_error_event(start) -> None:
    gateway = start(Upstream(tokens=9, cut_after=1))
    with gateway.client() as client, client.stream("POST", "/v1/messages", json=STREAM) as reply:
        text = reply.read().decode()
    assert "event: error\ndata: " in text
    assert json.loads(text.rsplit("data: ", 1)[1])["type"] == "error"


def test_a_failure_before_the_first_byte_is_tried_elsewhere(start) -> None:
    broken, whole = Upstream(cut_after=-1), Upstream()
    gateway = start(broken, whole)
    with gateway.client() as client:
        for number in range(8):
            text = client.post("/v1/chat/completions", json=STREAM | {"user": str(number)}).text
            assert text.endswith("data: [DONE]\n\n")
            assert "error" not in text
    assert len(whole.seen) == 8
    gateway.until_idle()


def test_a_request_that_brings_replicas_down_gets_two_and_no_more(start) -> None:
    upstreams = [Upstream(cut_after=-1) for _ in range(4)]
    gateway = start(*upstreams)
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", json=STREAM)
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == 502
    assert sum(len(upstream.seen) for upstream in upstreams) == 2
    gateway.until_idle()


def test_one_broken_connection_does_not_bring_a_replica_down(start) -> None:
    upstream = Upstream(cut_after=-1, cuts=1)
    gateway = start(upstream)
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=STREAM).text.endswith("data: [DONE]\n\n")
    assert len(upstream.seen) == 2
    assert gateway.gateway.ready


def test_a_broken_answer_that_is_no_stream_ends_with_a_broken_connection(start) -> None:
    gateway = start(Upstream(cut_after=10))
    with gateway.client() as client, pytest.raises(httpx.RemoteProtocolError):
        client.post("/v1/chat/completions", json=CHAT)
    gateway.until_idle()
    assert gateway.lines[-1]["error"] == "replica_lost"


def test_a_dead_port_is_passed_over(start) -> None:
    upstream = Upstream()
    gateway = start(upstream, Upstream())
    for replica in gateway.gateway.replicas.all[1:]:
        replica.url = f"http://127.0.0.1:{free_port()}"
    with gateway.client() as client:
        for number in range(6):
            gateway.gateway.replicas.all[1].up = True
            chat = {"messages": [{"role": "user", "content": f"session {number}"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert len(upstream.seen) == 6


def test_a_silent_replica_has_an_end(start) -> None:
    gateway = start(Upstream(hold=60), limits={"replica_seconds": 0.3})
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 504
        assert "0.3 seconds" in reply.json()["error"]["message"]
        text = client.post("/v1/chat/completions", json=STREAM).text
    assert text.startswith(": keep-alive\n\n")
    assert json.loads(text.rsplit("data: ", 1)[1])["error"]["code"] == 502
    gateway.until_idle()


def test_a_client_that_does_not_read_has_an_end(start) -> None:
    upstream = Upstream(tokens=1000, filler="x" * 100_000)
    gateway = start(upstream, limits={"client_seconds": 0.3})
    body = json.dumps(STREAM).encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        gateway.until(lambda: upstream.cancelled == 1, "the replica was left")
    gateway.until_idle()


def test_no_replica_is_up(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.05)
    upstream = Upstream()
    gateway = start(upstream)
    upstream.healthy = False
    gateway.until(lambda: not gateway.gateway.ready, "the replica is seen to be down")
    with gateway.client() as client:
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        for reply in (client.post("/v1/chat/completions", json=CHAT), client.get("/v1/models")):
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) > 0


def test_the_context_of_the_model(start) -> None:
    gateway = start(Upstream())
    gateway.until(lambda: gateway.gateway.model is not None, "the model is known")
    with gateway.client() as client:
        found = client.get("/v1/kimi/context").json()
    assert found == {
        "model": "fake",
        "max_model_len": 1000000,
        "kda_state_bytes": None,
        "mla_bytes_per_token": None,
    }
