"""Long prompts are read by a prefill server and answered by a replica, which reads them itself where that fails."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kimi_server.gateway.config.settings import PrefillSettings
from tests.support.gateway import Running, Start
from tests.support.upstream import Seen, Upstream, serving

SHORT = {"short_prompt": 16, "short_reserve": 64}
LONG = {"model": "fake", "messages": [{"role": "user", "content": "word " * 100}]}


@pytest.fixture
def split(start: Start) -> Iterator[Callable[..., Running]]:
    """`split(prefill, replica)`: a gateway before both."""
    with contextlib.ExitStack() as stack:

        def running(prefill: Upstream, *replicas: Upstream, **more: object) -> Running:
            [server] = stack.enter_context(serving(prefill))
            settings = (PrefillSettings(server.url, p2p="localhost:5710"),)
            gateway = start(*replicas, prefill=settings, admission=SHORT, **more)
            gateway.until(lambda: gateway.gateway.prefill.servers.any_up, "the prefill server up")
            return gateway

        yield running


def fields(seen: Seen) -> dict[str, Any]:
    return json.loads(seen.body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
@pytest.mark.parametrize(("cached", "role"), [(0, "remote_prefiller"), (3, "remote_kv_source")])
def test_a_long_prompt_is_read_elsewhere(split: Callable[..., Running], path: str, cached: int, role: str) -> None:
    """Handed over as it is read; what the server had in its cache is looked for in its host memory."""
    prefill, replica = Upstream(cached_tokens=cached), Upstream()
    gateway = split(prefill, replica)
    asked = LONG | {"max_tokens": 50, "min_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    with gateway.client() as client:
        assert client.post(path, json=asked).text.endswith("data: [DONE]\n\n")
    [read], [answered] = map(fields, prefill.seen), map(fields, replica.seen)
    name = read.pop("kv_transfer_params")["remote_decoder"]["kv_request_id"]
    assert answered.pop("kv_transfer_params") == {
        role: {"kv_request_id": name, "remote_host": "127.0.0.1", "remote_port": 5710}
    }
    assert answered == asked
    limits = ("max_tokens",) if path != "/v1/chat/completions" else ("max_tokens", "max_completion_tokens")
    assert read == asked | {"min_tokens": 0, "stream": False, "stream_options": None} | dict.fromkeys(limits, 1)
    assert gateway.metric("prefills_total", outcome="read") == 1


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", LONG | {"messages": [{"role": "user", "content": "word"}]}),
        ("/v1/chat/completions", LONG | {"n": 2}),
        ("/v1/completions", {"prompt": ["word " * 100, "word " * 100]}),
        ("/v1/responses", {"input": "word " * 100}),
    ],
)
def test_others_are_read_by_the_replica(split: Callable[..., Running], path: str, body: dict[str, object]) -> None:
    prefill, replica = Upstream(), Upstream()
    with split(prefill, replica).client() as client:
        assert client.post(path, json=body).status_code == 200
    assert not prefill.seen
    assert [fields(seen) for seen in replica.seen] == [body]


@pytest.mark.parametrize("prefill", [Upstream(status=500), Upstream(cut_after=-1), Upstream(hold=60)])
def test_without_a_prefill_server_the_replica_reads(split: Callable[..., Running], prefill: Upstream) -> None:
    replica = Upstream()
    gateway = split(prefill, replica, limits={"replica_seconds": 0.5})
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=LONG).status_code == 200
    assert prefill.seen
    assert [fields(seen) for seen in replica.seen] == [LONG]
    assert gateway.metric("prefills_total", outcome="failed") == 1
    gateway.until_idle()


def test_a_prefill_server_that_is_down_is_not_asked(split: Callable[..., Running]) -> None:
    prefill, replica = Upstream(), Upstream()
    gateway = split(prefill, replica)
    prefill.healthy = False
    gateway.until(lambda: not gateway.gateway.prefill.servers.any_up, "the prefill server down")
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=LONG).status_code == 200
    assert not prefill.seen


def test_the_client_leaves_while_its_prompt_is_read(split: Callable[..., Running]) -> None:
    prefill, replica = Upstream(hold=60), Upstream()
    gateway = split(prefill, replica)
    gateway.ask_and_leave("/v1/chat/completions", LONG, lambda: prefill.running == 1)
    gateway.until(lambda: prefill.cancelled == 1, "the prefill server learns")
    gateway.until_idle()
    assert not replica.seen


def test_a_client_names_no_hosts(split: Callable[..., Running]) -> None:
    prefill, replica = Upstream(), Upstream()
    place = {"remote_prefiller": {"kv_request_id": "a", "remote_host": "other", "remote_port": 1}}
    with split(prefill, replica).client() as client:
        reply = client.post("/v1/chat/completions", json=LONG | {"kv_transfer_params": place})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "kv_transfer_params is set by the gateway: leave it out."
        assert client.post("/v1/chat/completions", json=LONG | {"kv_transfer_params": None}).status_code == 200
    assert len(replica.seen) == 1
