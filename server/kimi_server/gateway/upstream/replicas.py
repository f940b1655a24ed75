"""The replicas: health checks, load, and what /v1/models says of them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from kimi_server.gateway.config.settings import API_KEY_VARIABLE, ReplicaSettings

PROBE_SECONDS = 1.0
PROBE_TIMEOUT = 5.0
MAX_MISSED_PROBES = 3  # in a row, before a replica is down: a busy machine may be late

log = logging.getLogger(__name__)


class Replica:
    """One vLLM server, or one data-parallel rank of it.

    `url` has no trailing slash; its path is put before every path. `headers` are sent with every request.
    """

    def __init__(self, index: int, settings: ReplicaSettings) -> None:
        self.index = index
        self.url = settings.url
        self.rank = settings.data_parallel_rank
        self.headers: dict[str, str] = {}
        if settings.api_key is not None:
            self.headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        self.name = f"{self.url} {self.rank}"  # hashed with the session: does not depend on the order in the file
        self.up = False
        self.down_reason: str | None = None  # as last logged
        self.model: str | None = None  # these two from /v1/models, when it last came up
        self.max_model_len: int | None = None
        self.running = 0  # requests sent to it that have not ended
        self.missed_probes = 0  # in a row
        self.probe_requested = asyncio.Event()  # probe now, not at the next interval

    def url_for(self, target: bytes) -> httpx.URL:
        """The URL of `target`, a path with its query, at this replica."""
        url = httpx.URL(self.url)
        return url.copy_with(raw_path=url.raw_path.rstrip(b"/") + target)

    @contextlib.contextmanager
    def track_request(self) -> Iterator[None]:
        """Count one request as running."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class ReplicaLost(Exception):
    """The connection to a replica failed before a byte of a response. `reached`: it may have got the request."""

    def __init__(self, replica: Replica, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.replica = replica
        self.reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


class Replicas:
    """`on_change` is called when a replica goes up or down; `called` is what the log calls one."""

    def __init__(
        self, settings: Sequence[ReplicaSettings], on_change: Callable[[], None], called: str = "replica"
    ) -> None:
        self.called = called
        self.all = [Replica(index, one) for index, one in enumerate(settings)]
        self.on_change = on_change

    @property
    def any_up(self) -> bool:
        return any(replica.up for replica in self.all)

    def mark(self, replica: Replica, up: bool, reason: str = "") -> None:
        """Set a replica up or down; logged when that changes, and when the reason of one that is down does."""
        replica.missed_probes = 0
        if up != replica.up or (not up and reason != replica.down_reason):
            level, state = (logging.INFO, "up") if up else (logging.WARNING, f"down: {reason}")
            log.log(level, "%s %d (%s) is %s", self.called, replica.index, replica.url, state)
        replica.down_reason = reason
        if up != replica.up:
            replica.up = up
            self.on_change()

    async def probe(self, client: httpx.AsyncClient, replica: Replica) -> None:
        """Ask /health once; of a replica that comes up /v1/models too, with the API key as requests have it.

        A refused connection or another status than 200 takes the replica down at once, a timeout only after
        MAX_MISSED_PROBES.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                status, asked = (await self._get(client, replica, "/health")).status_code, "/health"
                if status == 200 and not replica.up:
                    reply, asked = await self._get(client, replica, "/v1/models"), "/v1/models"
                    status = reply.status_code
                    if status == 200:
                        _store_model(replica, reply)
        except httpx.ConnectError as error:
            self.mark(replica, False, str(error) or type(error).__name__)
        except (TimeoutError, httpx.HTTPError) as error:
            replica.missed_probes += 1
            if replica.missed_probes >= MAX_MISSED_PROBES or not replica.up:
                self.mark(replica, False, f"its probes get no answer ({type(error).__name__})")
        except Exception as error:
            if client.is_closed:  # by the gateway's own end, which says nothing of the replica
                return
            self.mark(replica, False, f"it cannot be asked ({type(error).__name__}: {error})")
        else:
            hint = f": set its api_key or {API_KEY_VARIABLE}" if status in (401, 403) else ""
            self.mark(replica, status == 200, f"{asked} answers {status}{hint}")

    async def _get(self, client: httpx.AsyncClient, replica: Replica, path: str) -> httpx.Response:
        return await client.get(replica.url_for(path.encode()), headers=replica.headers)

    async def watch(self, client: httpx.AsyncClient, replica: Replica) -> None:
        """Probe a replica, then wait for the next interval or a request to probe."""
        await self.probe(client, replica)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                await replica.probe_requested.wait()
        replica.probe_requested.clear()


def _store_model(replica: Replica, reply: httpx.Response) -> None:
    """Keep name and context length of the first model, where the list has the form of vLLM's."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        found: dict[str, Any] = reply.json()["data"][0]
        replica.model, replica.max_model_len = str(found["id"]), int(found["max_model_len"])
