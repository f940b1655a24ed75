"""The replicas: which of them answer, how much each has to do, and in which order a request should try them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any

import httpx

from kimi_server.gateway.config.settings import API_KEY_VARIABLE, ReplicaSettings
from kimi_server.gateway.routing import rendezvous

PROBE_SECONDS = 1.0
PROBE_TIMEOUT = 5.0
SILENT_PROBES = 3  # without an answer in time: a busy machine may be late
# A session leaves its replica when that has this much more to do than the average.
OVERLOAD, SLACK = 1.25, 4

log = logging.getLogger(__name__)


class Replica:
    """`url` ends in no slash; what follows the host is put before every path. `headers` go with whatever is asked."""

    def __init__(self, index: int, settings: ReplicaSettings) -> None:
        self.index = index
        self.url = settings.url
        self.rank = settings.data_parallel_rank
        self.headers: dict[str, str] = {}
        if settings.api_key is not None:
            self.headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        self.name = f"{self.url} {self.rank}"  # what sessions hash: independent of the order in the file
        self.up = False
        self.why: str | None = None  # it is down, as last logged
        self.model: str | None = None  # these two as /v1/models told when it last came up
        self.max_model_len: int | None = None
        self.running = 0  # requests sent and not ended
        self.silent = 0  # probes without an answer, in a row
        self.doubted = asyncio.Event()  # asks for a probe before its time

    def at(self, target: bytes) -> httpx.URL:
        """The URL of a path, with its query, at this replica."""
        url = httpx.URL(self.url)
        return url.copy_with(raw_path=url.raw_path.rstrip(b"/") + target)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Count one running request."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Replicas:
    """`changed` is called when a replica went up or down."""

    def __init__(self, settings: Sequence[ReplicaSettings], changed: Callable[[], None]) -> None:
        self.all = [Replica(index, one) for index, one in enumerate(settings)]
        self.names = [replica.name for replica in self.all]
        self.changed = changed

    @property
    def any_up(self) -> bool:
        return any(replica.up for replica in self.all)

    def order(self, session: str | None, failed: frozenset[int] = frozenset()) -> list[int]:
        """Indexes of the replicas that are up, the best first.

        A session's own first, unless it is overloaded; without a session the one with least to do. Those that
        `failed` come last.
        """
        up = [replica for replica in self.all if replica.up]
        order = [replica.index for replica in sorted(up, key=lambda replica: replica.running)]
        if session is not None and len(up) > 1:
            most = ceil(OVERLOAD * sum(replica.running for replica in up) / len(up)) + SLACK
            wanted = [index for index in rendezvous(session, self.names) if self.all[index].up]
            calm = [index for index in wanted if self.all[index].running < most]
            order = calm + [index for index in order if index not in calm]
        return sorted(order, key=lambda index: index in failed)

    def mark(self, replica: Replica, up: bool, why: str = "") -> None:
        """Note that a replica answers, or no longer, or not yet; a reason is logged when it is a new one."""
        replica.silent = 0
        if up != replica.up or (not up and why != replica.why):
            log.warning("replica %d (%s) is %s", replica.index, replica.url, "up" if up else f"down: {why}")
        replica.why = why
        if up != replica.up:
            replica.up = up
            self.changed()

    async def probe(self, client: httpx.AsyncClient, replica: Replica) -> None:
        """Ask /health once, and one that comes up for its model too, as a request would be sent.

        One that refuses the connection or says that it is unwell is down at once.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                status, asked = (await self._get(client, replica, "/health")).status_code, "/health"
                if status == 200 and not replica.up:
                    reply, asked = await self._get(client, replica, "/v1/models"), "/v1/models"
                    status = reply.status_code
                    if status == 200:
                        _note_model(replica, reply)
        except httpx.ConnectError as error:
            self.mark(replica, False, str(error) or type(error).__name__)
        except (TimeoutError, httpx.HTTPError) as error:
            replica.silent += 1
            if replica.silent >= SILENT_PROBES or not replica.up:
                self.mark(replica, False, f"its probes get no answer ({type(error).__name__})")
        except Exception as error:
            self.mark(replica, False, f"it cannot be asked ({type(error).__name__}: {error})")
        else:
            hint = f": set its api_key or {API_KEY_VARIABLE}" if status in (401, 403) else ""
            self.mark(replica, status == 200, f"{asked} answers {status}{hint}")

    async def _get(self, client: httpx.AsyncClient, replica: Replica, path: str) -> httpx.Response:
        return await client.get(replica.at(path.encode()), headers=replica.headers)

    async def watch(self, client: httpx.AsyncClient, replica: Replica) -> None:
        """Probe a replica, and wait until that is due again."""
        await self.probe(client, replica)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                await replica.doubted.wait()
        replica.doubted.clear()


def _note_model(replica: Replica, reply: httpx.Response) -> None:
    """Keep what a list of models tells, as far as it has the form of vLLM's."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        found: dict[str, Any] = reply.json()["data"][0]
        replica.model, replica.max_model_len = str(found["id"]), int(found["max_model_len"])
