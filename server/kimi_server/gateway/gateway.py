"""The components of a running gateway and its life cycle."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TextIO

import httpx

from kimi_server.gateway import access_log
from kimi_server.gateway.admission import LANES, Admission
from kimi_server.gateway.background import repeat_forever
from kimi_server.gateway.config.settings import Settings
from kimi_server.gateway.context_cost import read_cost
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.metrics import Metrics
from kimi_server.gateway.request.body_budget import BodyBudget
from kimi_server.gateway.request.body_parser import BodyParser
from kimi_server.gateway.request.token_estimator import TokenEstimator
from kimi_server.gateway.tls import Certificate
from kimi_server.gateway.tracing import Tracing
from kimi_server.gateway.upstream.prefill import PrefillServers
from kimi_server.gateway.upstream.replicas import Replicas
from kimi_server.gateway.upstream.stored_responses import StoredResponses
from kimi_server.gateway.upstream.token_counter import TokenCounter
from kimi_server.gateway.upstream.transport import ReplicaTransport

CONNECT_SECONDS = 5.0

log = logging.getLogger(__name__)


class Gateway:
    """`log` gets the access log; None: stdout. Raises SettingsError where a file that is named cannot be used."""

    def __init__(self, settings: Settings, log: TextIO | None = None) -> None:
        self.settings = settings
        self.log = log or sys.stdout
        self.keyring = Keyring(settings.keys)
        self.context_cost = read_cost(settings.model_config) if settings.model_config else None
        self.certificate = None
        if settings.ssl_certfile and settings.ssl_keyfile:
            self.certificate = Certificate(settings.ssl_certfile, settings.ssl_keyfile)
        self.tracing = Tracing(settings.otlp_traces_endpoint)
        self.metrics = Metrics()
        self.token_estimator = TokenEstimator()
        self.body_budget, self.body_parser = BodyBudget(settings.limits.bodies_bytes), BodyParser()
        self.stored_responses = StoredResponses()
        self.admission = Admission(settings.admission, len(settings.replicas))
        self.replicas = Replicas(settings.replicas, on_change=self.admission.dispatch)
        self.draining = False
        self.active_requests = 0  # between their header and the last byte of their response
        limits = settings.limits
        self.timeout = httpx.Timeout(limits.replica_seconds, connect=CONNECT_SECONDS, pool=None)
        self.client = httpx.AsyncClient(
            timeout=self.timeout, transport=ReplicaTransport(), trust_env=False, follow_redirects=False
        )
        self.token_counter = TokenCounter(self.client)
        self.prefill = PrefillServers(settings.prefill, self.client, self.metrics)

    @property
    def ready(self) -> bool:
        return self.replicas.any_up and not self.draining

    @property
    def model(self) -> str | None:
        """The model's name at the replicas; None until one was up."""
        return next((replica.model for replica in self.replicas.all if replica.model), None)

    @property
    def max_model_len(self) -> int | None:
        """The longest context in tokens: configured, else of a replica; None until one was up."""
        asked = (replica.max_model_len for replica in self.replicas.all if replica.max_model_len)
        return self.settings.max_model_len or next(asked, None)

    @property
    def uses_cache_salts(self) -> bool:
        """Whether the keys' owners have separate prefix caches."""
        asked = self.settings.cache_salt
        return self.keyring.owners > 1 if asked is None else asked

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within the context: probe the replicas and watch the file of keys."""
        background = [
            asyncio.create_task(repeat_forever(f"the probe of {one.url}", partial(group.watch, self.client, one)))
            for group in (self.replicas, self.prefill.servers)
            for one in group.all
        ]
        background.append(asyncio.create_task(repeat_forever("the watch over the keys", self.keyring.watch)))
        if self.certificate is not None:
            watch = repeat_forever("the watch over the certificate", self.certificate.watch)
            background.append(asyncio.create_task(watch))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self.client.aclose()
            self.body_parser.close()
            await self.tracing.close()

    @contextlib.contextmanager
    def track_request(self) -> Iterator[None]:
        """Count one request as active."""
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    async def drain(self) -> None:
        """Reject new requests; return when the active ones have ended, or are cut off after drain_seconds."""
        self.draining = True
        log.info(
            "stopping: %d requests have up to %g seconds to finish", self.active_requests, self.settings.drain_seconds
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.active_requests:
                    await asyncio.sleep(0.05)
                return
        log.warning("%d requests were cut off after %g seconds", self.active_requests, self.settings.drain_seconds)
        # Reading from a replica now fails as if the replica had been lost.
        self.admission.close()
        await self.client.aclose()

    def record(self, entry: access_log.AccessLogEntry) -> None:
        """Write the end of a request to the access log and the metrics."""
        metrics, key = self.metrics, entry.key_id or ""
        metrics.requests.labels(entry.route, entry.status, entry.lane or "none").inc()
        if entry.rejected:
            metrics.rejected.labels(entry.error).inc()
        for counter, amount in (
            (metrics.prompt_tokens, entry.prompt_tokens if entry.usage_reported else None),
            (metrics.cached_tokens, entry.cached_tokens),
            (metrics.completion_tokens, entry.completion_tokens),
        ):
            if amount:
                counter.labels(key).inc(amount)
        if entry.ttft is not None:
            metrics.ttft.labels(entry.lane).observe(entry.ttft)
        access_log.write(entry, self.log)

    def metrics_text(self) -> bytes:
        """The metrics as text, with the gauges updated."""
        metrics = self.metrics
        for lane in LANES:
            metrics.queued.labels(lane).set(self.admission.waiting(lane))
        for replica, outstanding in zip(self.replicas.all, self.admission.outstanding, strict=True):
            metrics.up.labels(replica.index).set(replica.up)
            metrics.running.labels(replica.index).set(replica.running)
            for lane, tokens in outstanding.items():
                metrics.outstanding.labels(replica.index, lane).set(tokens)
        return metrics.text()
