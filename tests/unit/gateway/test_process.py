"""The gateway as a command: its messages, its start, and its end under load."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kimi_server.cli import main
from kimi_server.gateway.config.settings import ReplicaSettings, Settings
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.server import Server
from tests.support.gateway import CHAT
from tests.support.gateway_process import GatewayProcess
from tests.support.upstream import Upstream, serving

STREAM = CHAT | {"stream": True}


@pytest.fixture
def upstream() -> Upstream:
    return Upstream(tokens=100)


@pytest.fixture
def upstream_url(upstream: Upstream) -> Iterator[str]:
    with serving(upstream) as [background]:
        yield background.url


def stream(url: str, texts: list[str], first: threading.Barrier) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=STREAM, trust_env=False, timeout=60) as reply:
        chunks = reply.iter_text()  # the first is a comment, which comes before any token
        text = next(chunks)
        first.wait(120)
        texts.append(text + "".join(chunks))


def run_streams(process: GatewayProcess, count: int) -> tuple[list[threading.Thread], list[str]]:
    """Streams that have all begun, and where their texts will be."""
    texts: list[str] = []
    first = threading.Barrier(count + 1)
    threads = [threading.Thread(target=stream, args=(process.url, texts, first)) for _ in range(count)]
    for thread in threads:
        thread.start()
    first.wait(120)
    return threads, texts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tmp_path: Path, upstream: Upstream, upstream_url: str, number: int) -> None:
    upstream.go.clear()
    with GatewayProcess(tmp_path, [upstream_url]) as gateway:
        threads, texts = run_streams(gateway, 10)
        gateway.process.send_signal(number)
        while (status := gateway.get("/readyz")) == 200:
            time.sleep(0.005)
        assert status == 503
        refused = httpx.post(f"{gateway.url}/v1/chat/completions", json=CHAT, trust_env=False)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert refused.headers["retry-after"]
        upstream.go.set()
        for thread in threads:
            thread.join(120)
        assert texts == [b"".join(upstream.transcript()).decode()] * 10
        assert gateway.process.wait(120) == 0
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        assert sorted(line["status"] for line in lines) == [200] * 10 + [503]
        said = gateway.errors.read_text().splitlines()
        assert all(line.startswith("INFO kimi_server.") for line in said), "what is well is no warning"
        for words in ("listening on http://", "is up", "stopping: 10 requests"):
            assert any(words in line for line in said), words


def test_what_does_not_end_in_time_is_told_so(tmp_path: Path, upstream: Upstream, upstream_url: str) -> None:
    upstream.held = lambda body: True
    with GatewayProcess(tmp_path, [upstream_url], drain_seconds=0.3) as gateway:
        threads, texts = run_streams(gateway, 3)
        gateway.process.terminate()
        for thread in threads:
            thread.join(120)
        for text in texts:
            error = json.loads(text.rsplit("data: ", 1)[1])["error"]
            assert "stopped" in error["message"]
        assert len(texts) == 3
        assert gateway.process.wait(120) == 0
        levels = [line.split()[0] for line in gateway.errors.read_text().splitlines()]
        assert levels.count("WARNING") == 1 and {*levels} == {"INFO", "WARNING"}
        assert "WARNING kimi_server.gateway.gateway: 3 requests were cut off" in gateway.errors.read_text()


def test_what_waits_when_the_time_is_over_is_refused(tmp_path: Path, upstream: Upstream, upstream_url: str) -> None:
    """One waits for its replica's first byte, two behind it for room."""
    upstream.hold = 600
    admission = {"prefill_tokens": 300, "short_prompt": 50, "short_reserve": 100}
    replies: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": [1] * 200}
        replies.append(httpx.post(f"{gateway.url}/v1/completions", json=body, trust_env=False, timeout=60))

    with GatewayProcess(tmp_path, [upstream_url], drain_seconds=0.3, admission=admission) as gateway:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while 'kimi_gateway_queued{lane="long"} 2.0' not in httpx.get(gateway.metrics_url, trust_env=False).text:
            time.sleep(0.005)
        gateway.process.terminate()
        for thread in threads:
            thread.join(60)
        assert [reply.status_code for reply in replies] == [503] * 3
        assert all("shutting down" in reply.json()["error"]["message"] for reply in replies)
        assert gateway.process.wait(30) == 0
        assert "Traceback" not in gateway.errors.read_text()


def test_a_second_signal_stops_at_once(tmp_path: Path, upstream: Upstream, upstream_url: str) -> None:
    upstream.held = lambda body: True
    with GatewayProcess(tmp_path, [upstream_url]) as gateway:
        client = httpx.Client(trust_env=False)
        with client, client.stream("POST", f"{gateway.url}/v1/chat/completions", json=STREAM) as reply:
            chunks = reply.iter_raw()  # kept: dropping it would close the connection
            next(chunks)
            gateway.process.terminate()
            while gateway.get("/readyz") == 200:
                time.sleep(0.005)
            gateway.process.terminate()
            gateway.process.wait(120)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["gateway", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_workers_above_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "--workers", "4", "--config", "x.yaml")
    assert "--workers is 4" in said and "one process" in said


def test_what_is_wrong_at_the_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--config is missing" in complaint(capsys)
    assert "nothing.yaml cannot be read" in complaint(capsys, "--config", str(tmp_path / "nothing.yaml"))
    config = tmp_path / "gateway.yaml"
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\nkeys: keys.yaml")
    assert "keys.yaml cannot be read" in complaint(capsys, "--config", str(config))
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]")
    assert "0.0.0.0" in complaint(capsys, "--config", str(config), "--host", "0.0.0.0")
    (tmp_path / "config.json").write_text("{}")
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\nmodel_config: config.json")
    assert "model_config" in complaint(capsys, "--config", str(config))


def test_neither_torch_nor_vllm_is_needed() -> None:
    without = "import sys; sys.modules.update(torch=None, vllm=None, transformers=None, opentelemetry=None)"
    subprocess.run([sys.executable, "-c", f"{without}; import kimi_server.gateway.server"], check=True)


def test_a_new_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["gateway", "key", "team-a"]) == 0
    printed = capsys.readouterr().out
    [key] = [line.strip() for line in printed.splitlines() if line.strip().startswith("sk-")]
    entry = printed[printed.index("- id") :]
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + entry)
    assert Keyring(path).authenticate(key).key.id == "team-a"
    assert printed.count(key) == 1


def test_a_drain_that_fails_still_ends_the_process_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Gateway(Settings(replicas=(ReplicaSettings("http://127.0.0.1:1"),))))

    async def drain() -> None:
        raise RuntimeError("the drain broke")

    monkeypatch.setattr(server.gateway, "drain", drain)
    asyncio.run(server._drain())
    assert server.should_exit and server.failed


def test_a_port_of_the_metrics_that_is_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(f"replicas: [{{url: 'http://127.0.0.1:1'}}]\nmetrics_port: {port}")
        said = complaint(capsys, "--config", str(config), "--port", "0")
    assert f"metrics_port {port}" in said and "name others" in said
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]")
    assert "metrics_port is 9464" in complaint(capsys, "--config", str(config), "--port", "9464")
