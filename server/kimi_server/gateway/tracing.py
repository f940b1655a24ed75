"""An OpenTelemetry span a request. Without `otlp_traces_endpoint` none of its packages is imported."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from kimi_server.gateway.access_log import CLIENT_CLOSED_REQUEST, AccessLogEntry
from kimi_server.gateway.config.yaml_file import SettingsError
from kimi_server.gateway.request.client import Client
from vllm_kimi_linear import __version__

SERVICE = "kimi-linear-gateway"  # unless OTEL_SERVICE_NAME says another
EXPORT_SECONDS = 2  # for one batch, with all its tries: a stop waits for the last
CONTEXT = (b"traceparent", b"tracestate")
# Attribute -> field of the access log's entry; the names are vLLM's, where it has one.
ATTRIBUTES = {
    "gen_ai.request.id": "request_id",
    "gen_ai.usage.prompt_tokens": "prompt_tokens",
    "gen_ai.usage.completion_tokens": "completion_tokens",
    "gen_ai.latency.time_in_queue": "queue_seconds",
    "gen_ai.latency.time_to_first_token": "ttft",
    "kimi.cached_tokens": "cached_tokens",
    "kimi.key": "key_id",
    "kimi.lane": "lane",
    "kimi.reading": "reading",
    "kimi.replica": "replica",
    "kimi.running": "running",
    "error.type": "error",
}


class Tracing:
    """`endpoint` takes OTLP over HTTP, such as http://collector:4318/v1/traces; None: there are no spans.

    Raises SettingsError where the packages are not installed. The OTEL_ variables of the environment say the rest.
    """

    def __init__(self, endpoint: str | None) -> None:
        self.provider: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise SettingsError(
                f"otlp_traces_endpoint is {endpoint!r} and OpenTelemetry is not installed ({error}): "
                "pip install 'vllm-kimi-linear[tracing]', or leave the field out."
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS))
        )
        self.tracer = self.provider.get_tracer(SERVICE, __version__)
        self.propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, client: Client, method: str, entry: AccessLogEntry) -> Iterator[None]:
        """A span from here to the end of the context, under the client's; the replica's is put under it."""
        if self.provider is None:
            yield
            return
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        sent = {name.decode(): client.header(name) or "" for name in CONTEXT}
        span = self.tracer.start_span(
            f"{method} {entry.route}", context=self.propagator.extract(sent), kind=SpanKind.SERVER
        )
        own: dict[str, str] = {}
        self.propagator.inject(own, context=set_span_in_context(span))
        client.headers = [(name, value) for name, value in client.headers if name not in CONTEXT]
        client.headers += [(name.encode(), value.encode()) for name, value in own.items()]
        try:
            yield
        finally:
            span.set_attributes({"http.request.method": method, "http.route": entry.route})
            span.set_attribute("http.response.status_code", entry.status)
            for attribute, field in ATTRIBUTES.items():
                if (value := getattr(entry, field)) is not None:
                    span.set_attribute(attribute, value)
            if entry.status >= CLIENT_CLOSED_REQUEST or (entry.error and entry.status < 400):
                span.set_status(StatusCode.ERROR)
            span.end()

    async def close(self) -> None:
        """Send what is left."""
        if self.provider is not None:
            await asyncio.to_thread(self.provider.shutdown)
