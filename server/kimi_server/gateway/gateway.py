"""All that a running gateway consists of, put together from its settings."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TextIO

import httpx

from kimi_server.gateway import access_log
from kimi_server.gateway.admission import LANES, Admission
from kimi_server.gateway.background import keep_doing
from kimi_server.gateway.config.settings import Settings
from kimi_server.gateway.context_cost import read_cost
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.metrics import Metrics
from kimi_server.gateway.request.body_budget import Bodies
from kimi_server.gateway.request.body_parser import Reader
from kimi_server.gateway.request.prompt_size import Estimator
from kimi_server.gateway.routing import StoredResponses
from kimi_server.gateway.upstream.replicas import Replicas
from kimi_server.gateway.upstream.token_counter import Counts

CONNECT_SECONDS = 5.0


class Gateway:
    """Raises SettingsError where a file that the settings name cannot be used. `log` receives one line a request."""

    def __init__(self, settings: Settings, log: TextIO | None = None) -> None:
        self.settings = settings
        self.log = log or sys.stdout
        self.keyring = Keyring(settings.keys)
        self.context_cost = read_cost(settings.model_config) if settings.model_config else None
        self.metrics = Metrics()
        self.estimator = Estimator()
        self.bodies, self.reader = Bodies(settings.limits.bodies_bytes), Reader()
        self.stored = StoredResponses()
        self.admission = Admission(settings.admission, len(settings.replicas))
        self.replicas = Replicas(settings.replicas, changed=self.admission.dispatch)
        self.draining = False
        self.exchanges = 0  # requests between their header and the last byte of their answer
        limits = settings.limits
        self.timeout = httpx.Timeout(limits.replica_seconds, connect=CONNECT_SECONDS, pool=None)
        self.client = httpx.AsyncClient(
            timeout=self.timeout,
            # vLLM closes a connection that was idle for 5 seconds; ours go before, so as not to meet that moment.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
            trust_env=False,
            follow_redirects=False,
        )
        self.counts = Counts(self.client)

    @property
    def ready(self) -> bool:
        return self.replicas.any_up and not self.draining

    @property
    def model(self) -> str | None:
        """What the replicas serve; None until one of them was up."""
        return next((replica.model for replica in self.replicas.all if replica.model), None)

    @property
    def max_model_len(self) -> int | None:
        """The longest context in tokens, where it is known."""
        asked = (replica.max_model_len for replica in self.replicas.all if replica.max_model_len)
        return self.settings.max_model_len or next(asked, None)

    @property
    def salts(self) -> bool:
        """Whether the prefix caches are divided among the keys' owners."""
        asked = self.settings.cache_salt
        return self.keyring.owners > 1 if asked is None else asked

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Probe the replicas and watch the keys meanwhile."""
        background = [
            asyncio.create_task(keep_doing(f"the probe of {one.url}", partial(self.replicas.watch, self.client, one)))
            for one in self.replicas.all
        ]
        background.append(asyncio.create_task(keep_doing("the watch over the keys", self.keyring.watch)))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self.client.aclose()
            self.reader.close()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Count one request."""
        self.exchanges += 1
        try:
            yield
        finally:
            self.exchanges -= 1

    async def drain(self) -> None:
        """Take nothing new, and return when all that runs has ended, or is over its time and was broken off."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.exchanges:
                    await asyncio.sleep(0.05)
                return
        # What reads from a replica now meets a closed connection, and ends as if that replica had gone.
        self.admission.close()
        await self.client.aclose()

    def record(self, entry: access_log.Entry) -> None:
        """Note the end of a request in the log and the metrics."""
        metrics, key = self.metrics, entry.key or ""
        metrics.requests.labels(entry.route, entry.status, entry.lane or "none").inc()
        if entry.refused:
            metrics.rejected.labels(entry.error).inc()
        for counter, amount in (
            (metrics.prompt, entry.tokens if entry.counted else None),
            (metrics.cached, entry.cached),
            (metrics.completion, entry.completion),
        ):
            if amount:
                counter.labels(key).inc(amount)
        if entry.ttft is not None:
            metrics.ttft.labels(entry.lane).observe(entry.ttft)
        access_log.write(entry, self.log)

    def metrics_text(self) -> bytes:
        """The metrics, those that tell of this moment brought up to date."""
        metrics = self.metrics
        for lane in LANES:
            metrics.queued.labels(lane).set(self.admission.waiting(lane))
        for replica, outstanding in zip(self.replicas.all, self.admission.outstanding, strict=True):
            metrics.up.labels(replica.index).set(replica.up)
            metrics.running.labels(replica.index).set(replica.running)
            for lane, tokens in outstanding.items():
                metrics.outstanding.labels(replica.index, lane).set(tokens)
        return metrics.text()
