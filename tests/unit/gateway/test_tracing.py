"""A span a request, sent to a collector; nothing of OpenTelemetry where none is named."""

import asyncio
import builtins
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_server.cli import main
from kimi_server.gateway.access_log import AccessLogEntry
from kimi_server.gateway.config.settings import LimitSettings
from kimi_server.gateway.request.client import Client
from kimi_server.gateway.tracing import Tracing
from tests.support.gateway import CHAT, bearer
from tests.support.upstream import Upstream

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP; `spans` has those of all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self) -> list[Any]:
        trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        found = [trace_service.ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for one in found for of in one.resource_spans for scope in of.scope_spans for span in scope.spans]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `tracing` is not installed")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def values(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_span_stands_between_the_clients_and_the_replicas(start, keys_file, collector: Collector) -> None:
    upstream = Upstream(prompt_tokens=1234, tokens=5)
    gateway = start(upstream, keys=keys_file(alice={}), otlp_traces_endpoint=collector.url)
    sent = bearer("alice") | {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    with gateway.client(headers=sent) as client:
        assert client.post("/v1/chat/completions", json=CHAT | {"stream": True}).status_code == 200
    gateway.until(lambda: len(collector.spans) == 1, "the span arrives")
    [span] = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    [header] = upstream.seen[0].header(b"traceparent")
    assert header.decode() == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert upstream.seen[0].header(b"tracestate") == [b"a=b"]
    assert span.name == "POST /v1/chat/completions" and span.end_time_unix_nano > span.start_time_unix_nano
    found = values(span)
    assert found["http.response.status_code"] == 200
    assert found["gen_ai.usage.prompt_tokens"] == 1234 and found["gen_ai.usage.completion_tokens"] == 5
    assert found["kimi.key"] == "alice" and found["kimi.lane"] == "short" and found["kimi.replica"] == 0
    assert found["gen_ai.latency.time_to_first_token"] > 0
    assert not any("sk-alice" in str(value) or "Hello" in str(value) for value in found.values())


def test_a_failure_is_marked_and_a_refusal_is_not(start, keys_file, collector: Collector) -> None:
    gateway = start(Upstream(cut_after=-1), keys=keys_file(alice={}), otlp_traces_endpoint=collector.url)
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT, headers=bearer("eve")).status_code == 401
        body = CHAT | {"stream": True}
        assert client.post("/v1/chat/completions", json=body, headers=bearer("alice")).status_code == 502
    gateway.until(lambda: len(collector.spans) == 2, "both spans arrive")
    refused, failed = sorted(collector.spans, key=lambda span: values(span)["http.response.status_code"])
    assert (refused.status.code, failed.status.code) == (0, 2)
    assert (values(refused)["error.type"], values(failed)["error.type"]) == ("unknown_key", "replica_lost")


def test_without_an_endpoint_the_clients_context_passes_as_it_is(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    with gateway.client(headers={"traceparent": TRACEPARENT}) as client:
        client.post("/v1/chat/completions", json=CHAT)
    assert upstream.seen[0].header(b"traceparent") == [TRACEPARENT.encode()]


def test_without_the_packages_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    config = tmp_path / "gateway.yaml"
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\notlp_traces_endpoint: http://collector:4318/v1/traces")
    assert main(["gateway", "--config", str(config)]) == 2
    assert "pip install 'vllm-kimi-linear[tracing]'" in capsys.readouterr().err
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\notlp_traces_endpoint: collector:4318")
    assert main(["gateway", "--config", str(config)]) == 2
    assert "http://" in capsys.readouterr().err
    assert Tracing(None).provider is None


def test_the_context_is_closed_where_the_request_raises(collector: Collector) -> None:
    """A span that is never ended is never sent."""
    tracing = Tracing(collector.url)
    client = Client({"headers": [], "query_string": b""}, None, None, LimitSettings())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), tracing.request(client, "GET", AccessLogEntry("req-1", "/v1/models", 0.0)):
        raise RuntimeError
    asyncio.run(tracing.close())
    assert [span.name for span in collector.spans] == ["GET /v1/models"]
