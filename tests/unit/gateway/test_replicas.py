"""Replicas: their URLs, their keys, and that one of them never decides about the others."""

import asyncio
import contextlib
import json
import logging
from pathlib import Path

import httpx
import pytest

from kimi_server.gateway import background
from kimi_server.gateway.config.settings import ReplicaSettings, Settings, SettingsError, load
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.upstream import replicas
from kimi_server.gateway.upstream.replicas import Replica, Replicas
from tests.support.gateway import CHAT
from tests.support.upstream import Upstream, serving


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:abc", "http://127.0.0.1:80000", "http://127.0.0.1:0", "http://[::1", "http://"),
        *("http:///x", "http://u:p@x", "http://x?y", "http://x#y", "http://x y", "http://x\ny", "http://a..b"),
        *("ftp://x", "http://x:-1", "http://\ud800", "http://:80", "127.0.0.1", ""),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_when_it_is_read(tmp_path: Path, url: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps({"replicas": [{"url": url}]}))
    with pytest.raises(SettingsError) as error:
        load(path)
    message = str(error.value)
    assert "replicas[0].url" in message and "it must " in message
    assert message.isprintable() and ":p@" not in message


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://x:8000", "http://x:8000/v1/models?a=b"),
        ("http://x:8000/", "http://x:8000/v1/models?a=b"),
        ("http://x:8000/v1", "http://x:8000/v1/models?a=b"),
        ("http://x:8000/v1/", "http://x:8000/v1/models?a=b"),
        ("https://[::1]/a/b/v1", "https://[::1]/a/b/v1/models?a=b"),
        ("HTTP://X/team%20a/", "http://x/team%20a/v1/models?a=b"),
    ],
)
def test_where_a_request_goes(url: str, seen: str) -> None:
    replica = Replica(0, ReplicaSettings(url))
    assert str(replica.url_for(b"/v1/models?a=b")) == seen


class Prefixed(Upstream):
    """A replica behind a path: without it there is nothing."""

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            if not scope["path"].startswith("/team/"):
                return await self.reply(send, 404, b"{}")
            scope = {**scope, "path": scope["path"].removeprefix("/team")}
        await super().__call__(scope, receive, send)


def test_a_path_counts_for_probes_and_requests(start_at) -> None:
    upstream = Prefixed()
    gateway = start_at(upstream, more="/team/v1/")
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert upstream.seen[-1].path == "/v1/chat/completions"
    assert gateway.gateway.model == "fake"


class Counting(Upstream):
    """Keeps the address that each request came from."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[tuple[str, int]] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            self.addresses.append(scope["client"])
        await super().__call__(scope, receive, send)


def test_no_connection_to_a_replica_is_used_again(start_at) -> None:
    """It may close an idle one at any moment, and a prompt that was sent on it would be lost."""
    gateway = start_at(upstream := Counting())
    with gateway.client() as client:
        assert [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(10)] == [200] * 10
    assert len(upstream.addresses) == len(set(upstream.addresses)) >= 12  # two are a probe's


@pytest.fixture
def start_at(start):
    """`start_at(upstream, more="/v1", api_key=...)`: a gateway whose one replica has this URL and key."""
    with contextlib.ExitStack() as stack:

        def begin(upstream: Upstream, more: str = "", wait: bool = True, **entry):
            [background] = stack.enter_context(serving(upstream))
            return start(replicas=(ReplicaSettings(background.url + more, **entry),), wait=wait)

        yield begin


class Guarded(Upstream):
    """A replica that was started with `--api-key sk-replica`."""

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            sent = dict(scope["headers"]).get(b"authorization")
            if sent != b"Bearer sk-replica":
                return await self.reply(send, 401, b'{"error":"Unauthorized"}')
        await super().__call__(scope, receive, send)


def test_a_replica_with_a_key(start_at, caplog: pytest.LogCaptureFixture) -> None:
    gateway = start_at(Guarded(), api_key="sk-replica")
    with caplog.at_level(logging.DEBUG), gateway.client(headers={"authorization": "Bearer sk-client"}) as client:
        reply = client.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 200
        metrics = client.get(gateway.metrics_url).text
    shown = [repr(gateway.gateway.settings), repr(vars(gateway.gateway.settings)), metrics, str(reply.headers)]
    assert not any("sk-replica" in text for text in [*shown, gateway.log.getvalue(), caplog.text])


def test_a_replica_that_refuses_the_key_is_down_and_the_log_says_why(start_at, caplog) -> None:
    with caplog.at_level(logging.WARNING, "kimi_server"):
        gateway = start_at(Guarded(), api_key="sk-wrong", wait=False)
        gateway.until(lambda: bool(caplog.records), "the reason is logged")
    [record] = caplog.records
    assert "401" in record.getMessage() and "api_key" in record.getMessage()
    assert "sk-wrong" not in record.getMessage()
    assert not gateway.gateway.ready


def test_a_key_that_the_replica_no_longer_takes_is_no_401_of_the_client(start_at) -> None:
    gateway = start_at(Guarded(), api_key="sk-replica")
    gateway.gateway.replicas.all[0].headers.clear()
    with gateway.client() as client:
        reply = client.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 502
    assert "own key" in reply.json()["error"]["message"]


def test_the_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("replicas: [{url: 'http://x'}, {url: 'http://y', api_key: own}]")
    assert load(path).replicas[0].api_key is None
    monkeypatch.setenv("VLLM_API_KEY", "shared")
    keys = [one.api_key.get_secret_value() for one in load(path).replicas if one.api_key]
    assert keys == ["shared", "own"]
    assert "shared" not in repr(load(path))
    monkeypatch.setenv("VLLM_API_KEY", "two\nlines")
    with pytest.raises(SettingsError, match="VLLM_API_KEY") as error:
        load(path)
    assert "lines" not in str(error.value)


@pytest.mark.parametrize("key", ["a\\nb", "a b", "é", ""])
def test_a_key_that_no_header_can_hold(tmp_path: Path, key: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(f'replicas: [{{url: "http://x", api_key: "{key}"}}]')
    with pytest.raises(SettingsError, match=r"replicas\[0\].api_key is .*: it must be printable ASCII"):
        load(path)


def test_one_bad_replica_does_not_end_the_probes_of_the_others(
    start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.05)
    upstream = Upstream()
    gateway = start(upstream, Upstream())
    bad = gateway.gateway.replicas.all[1]
    with caplog.at_level(logging.WARNING, "kimi_server"):
        bad.url = "http://127.0.0.1:abc"  # what no configuration holds
        bad.probe_requested.set()
        gateway.until(lambda: not bad.up, "the bad one is down")
        upstream.healthy = False
        gateway.until(lambda: not gateway.gateway.ready, "the other one is still probed")
        upstream.healthy = True
        gateway.until(lambda: gateway.gateway.ready, "and comes back")
    assert any("replica 1" in line and "InvalidURL" in line for line in caplog.messages)


def test_a_replica_that_was_never_up_is_said_once_and_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[object] = [httpx.ConnectError("refused")] * 3 + [503, 503, 200, 503]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 5}]})
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, int)
        return httpx.Response(found)

    async def run() -> Replicas:
        replicas = Replicas([ReplicaSettings("http://x")], on_change=lambda: None)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            while answers:
                await replicas.probe(client, replicas.all[0])
        return replicas

    with caplog.at_level(logging.INFO, "kimi_server"):
        found = asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "WARNING"]
    assert [message.partition(" is ")[2] for message in caplog.messages] == [
        "down: refused",
        "down: /health answers 503",
        "up",
        "down: /health answers 503",
    ]
    assert (found.all[0].model, found.all[0].max_model_len) == ("m", 5)


def test_an_exception_in_the_background_is_logged_and_the_task_goes_on(monkeypatch, caplog) -> None:
    pauses: list[float] = []
    rest = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await rest(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    rounds = 0

    async def once() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            return
        if rounds == 6:
            raise asyncio.CancelledError
        raise ValueError(f"round {rounds}")

    with caplog.at_level(logging.ERROR, "kimi_server"), pytest.raises(asyncio.CancelledError):
        asyncio.run(background.repeat_forever("the work", once))
    assert rounds == 6
    assert pauses == [1, 2, 4, 1]
    assert [message.split(";")[0] for message in caplog.messages] == ["the work failed"] * 4


def test_every_background_task_of_the_gateway_is_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each outlives an exception that its work lets through."""
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.0)
    settings = Settings(replicas=(ReplicaSettings("http://127.0.0.1:1"), ReplicaSettings("http://127.0.0.1:2")))
    gateway = Gateway(settings)
    calls: list[str] = []

    def failing(name: str):
        async def work(*arguments: object) -> None:
            calls.append(name)
            raise RuntimeError(name)

        return work

    monkeypatch.setattr(gateway.replicas, "watch", failing("probe"))
    monkeypatch.setattr(gateway.keyring, "watch", failing("keys"))

    async def run() -> None:
        async with gateway.running():
            background = asyncio.all_tasks() - {asyncio.current_task()}
            while calls.count("keys") < 3 or calls.count("probe") < 6:
                await asyncio.sleep(0)
            assert len(background) == 3
            assert not any(task.done() for task in background)

    asyncio.run(run())
