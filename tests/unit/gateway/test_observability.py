"""What the gateway tells of itself: the log, the metrics, which replica got what."""

import pytest

from kimi_demo.server import free_port
from kimi_server.gateway.metrics import Metrics
from kimi_server.gateway.upstream import replicas
from tests.support.gateway import CHAT
from tests.support.upstream import Upstream

LONG = {"prompt": [1] * 5000, "stream": True}


def test_the_log_of_a_request(start, keys_file) -> None:
    gateway = start(Upstream(tokens=5, prompt_tokens=1234), keys=keys_file(alice={}))
    secret = "Tell nobody of the blue heron"
    body = {"model": "fake", "messages": [{"role": "user", "content": secret}], "stream": True}
    with gateway.client(headers={"authorization": "Bearer sk-alice"}) as client:
        text = client.post("/v1/chat/completions", json=body).text
        client.post("/v1/chat/completions", content=b'{"heron')
        client.post(f"/v1/chat/completions?{secret.replace(' ', '')}!", json=body)
        client.get("/v1/heron")
    assert text
    gateway.until_idle()
    line, other = [line for line in gateway.lines if line["status"] == 200]
    assert other["route"] == line["route"]  # without the query
    assert list(line) == [
        *("time", "id", "key", "route", "status", "tokens", "estimated", "cached", "completion", "lane", "wait"),
        *("ttft", "seconds", "replica", "reading", "running", "session", "error"),
    ]
    assert line["key"] == "alice"
    assert line["route"] == "/v1/chat/completions"
    assert (line["status"], line["tokens"], line["cached"], line["completion"]) == (200, 1234, 3, 5)
    assert (line["estimated"], line["reading"], line["running"]) == (False, 0, 0)
    assert (line["lane"], line["replica"], line["error"]) == ("short", 0, None)
    assert 0 <= line["wait"] <= line["ttft"] <= line["seconds"]
    assert len(line["session"]) == 24
    assert {line["error"] for line in gateway.lines} == {None, "body"}
    log = gateway.log.getvalue()
    assert "heron" not in log and "sk-alice" not in log and "Bearer" not in log


def test_the_metrics(start) -> None:
    upstream = Upstream(hold=0.05)
    gateway = start(upstream, Upstream())
    with gateway.client() as client:
        client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        client.post("/v1/completions", json={"prompt": [1] * 5000})
        client.post("/v1/completions", content=b"{")
        client.get("/v1/models")
        gateway.until_idle()
        text = client.get(gateway.metrics_url).text
        assert client.get("/metrics").status_code == 404
    for line in (
        'kimi_gateway_requests_total{lane="short",route="/v1/chat/completions",status="200"} 1.0',
        'kimi_gateway_requests_total{lane="long",route="/v1/completions",status="200"} 1.0',
        'kimi_gateway_requests_total{lane="none",route="/v1/completions",status="400"} 1.0',
        'kimi_gateway_requests_total{lane="none",route="/v1/models",status="200"} 1.0',
        'kimi_gateway_queue_seconds_count{lane="long"} 1.0',
        'kimi_gateway_ttft_seconds_count{lane="short"} 1.0',
        'kimi_gateway_queued{lane="short"} 0.0',
        'kimi_gateway_running{replica="1"} 0.0',
        'kimi_gateway_prefill_tokens_outstanding{lane="long",replica="0"} 0.0',
        'kimi_gateway_prompt_tokens_total{key=""} 14.0',
        'kimi_gateway_cached_tokens_total{key=""} 6.0',
        'kimi_gateway_completion_tokens_total{key=""} 8.0',
        'kimi_gateway_rejected_total{reason="body"} 1.0',
        'kimi_gateway_replica_up{replica="0"} 1.0',
        "kimi_gateway_sessions_spilled_total 0.0",
    ):
        assert line in text.splitlines()


def test_a_prompt_is_outstanding_until_its_first_token(start) -> None:
    upstream = Upstream(held=lambda body: True)
    upstream.go.clear()
    gateway = start(upstream)
    with gateway.client() as client, client.stream("POST", "/v1/completions", json=LONG) as reply:
        chunks = reply.iter_raw()
        assert next(chunks) == b": keep-alive\n\n"
        assert gateway.outstanding == 5000
        upstream.go.set()
        assert b"data" in next(chunks)
        assert gateway.outstanding == 0
        assert gateway.gateway.replicas.all[0].running == 1
    gateway.until_idle()


def test_what_a_prompt_waits_for_at_its_replica_is_in_the_log(start) -> None:
    """A short prompt that is let through at once, to a replica that reads a long one."""
    upstream = Upstream()
    upstream.go.clear()
    gateway = start(upstream)
    with gateway.client() as client, client.stream("POST", "/v1/completions", json=LONG) as long:
        rest = long.iter_raw()
        next(rest)
        with client.stream("POST", "/v1/completions", json=LONG | {"prompt": [1] * 50}) as short:
            upstream.go.set()
            short.read()
        assert list(rest)
    gateway.until_idle()
    lines = {line["lane"]: (line["reading"], line["running"]) for line in gateway.lines}
    assert lines == {"short": (5000, 1), "long": (0, 0)}


@pytest.mark.parametrize(("status", "error"), [(400, "refused_by_replica"), (500, "failed_by_replica")])
def test_what_a_replica_refuses_is_an_error_and_its_prompt_an_estimate(status: int, error: str, start) -> None:
    gateway = start(Upstream(status=status, usage=False))
    with gateway.client() as client:
        assert client.post("/v1/completions", json={"prompt": [1] * 50}).status_code == status
    gateway.until_idle()
    [line] = gateway.lines
    assert (line["status"], line["error"], line["tokens"], line["estimated"]) == (status, error, 50, True)


def test_turns_go_where_their_prefix_is_and_leave_at_once_what_is_down(start) -> None:
    upstreams = [Upstream() for _ in range(3)]
    gateway = start(*upstreams)

    def ask(client, session: int) -> int:
        reply = client.post("/v1/chat/completions", json=CHAT, headers={"x-session-id": str(session)})
        assert reply.status_code == 200
        return int(reply.headers["x-kimi-replica"])

    with gateway.client() as client:
        homes = {session: ask(client, session) for session in range(30)}
        assert set(homes.values()) == {0, 1, 2}
        assert all(ask(client, session) == home for session, home in homes.items())
        gateway.gateway.replicas.all[1].url = f"http://127.0.0.1:{free_port()}"
        for session, home in homes.items():
            found = ask(client, session)
            assert found == home if home != 1 else found in (0, 2)
        assert not gateway.gateway.replicas.all[1].up


def test_a_replica_that_does_not_answer_its_probes_is_down(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.05)
    upstream = Upstream()
    gateway = start(upstream)
    monkeypatch.setattr(replicas, "PROBE_TIMEOUT", 0.1)
    upstream.health_seconds = 0.5
    gateway.until(lambda: not gateway.gateway.ready, "the replica is down")
    upstream.health_seconds = 0
    gateway.until(lambda: gateway.gateway.ready, "the replica is up again")


def test_a_session_leaves_an_overloaded_replica(start) -> None:
    gateway = start(Upstream(), Upstream())
    with gateway.client(headers={"x-session-id": "one"}) as client:
        home = int(client.post("/v1/chat/completions", json=CHAT).headers["x-kimi-replica"])
        replica = gateway.gateway.replicas.all[home]
        replica.running += 100
        assert int(client.post("/v1/chat/completions", json=CHAT).headers["x-kimi-replica"]) == 1 - home
        replica.running -= 100
        assert int(client.post("/v1/chat/completions", json=CHAT).headers["x-kimi-replica"]) == home


def test_a_stored_response_is_asked_for_where_it_was_made(start) -> None:
    upstreams = [Upstream(), Upstream()]
    gateway = start(*upstreams)
    gateway.gateway.stored_responses.remember("", "resp_here", 1)
    gateway.gateway.stored_responses.remember("", "resp_there", 0)
    with gateway.client() as client:
        for _ in range(3):
            client.get("/v1/responses/resp_here?stream=false")
            client.post("/v1/responses/resp_there/cancel")
            client.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_here"})
    assert [one.path for one in upstreams[1].seen] == ["/v1/responses/resp_here", "/v1/responses"] * 3
    assert upstreams[1].seen[0].query == b"stream=false"
    assert [one.path for one in upstreams[0].seen] == ["/v1/responses/resp_there/cancel"] * 3


def test_the_estimate_is_corrected_by_answers(start) -> None:
    gateway = start(Upstream(prompt_tokens=4000))
    body = {"messages": [{"role": "user", "content": "x" * 4000}]}
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=body).headers["x-kimi-lane"] == "short"
        for _ in range(30):
            client.post("/v1/chat/completions", json=body)
        gateway.until_idle()
        reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 5000}]})
    assert reply.headers["x-kimi-lane"] == "long"


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_without_usage_keeps_the_estimate(start, usage: bool) -> None:
    gateway = start(Upstream(usage=usage))
    body = {"prompt": [1] * 50, "stream": True}
    with gateway.client() as client:
        client.post("/v1/completions", json=body)
    gateway.until_idle()
    assert gateway.lines[-1]["tokens"] == (7 if usage else 50)
    assert gateway.lines[-1]["completion"] == (4 if usage else None)


def test_what_alerts_look_for_is_counted_from_the_start() -> None:
    """Prometheus sees no increase in a series that begins at one."""
    text = Metrics().text().decode()
    for reason in ("deadline", "no_replica", "queue_full"):
        assert f'kimi_gateway_rejected_total{{reason="{reason}"}} 0.0' in text.splitlines()
