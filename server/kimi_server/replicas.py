"""The replicas: which of them answer, how much each has to do, and in which order a request should try them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from math import ceil

import httpx

from kimi_server.sessions import rendezvous
from kimi_server.settings import ReplicaSettings

PROBE_SECONDS = 1.0
PROBE_TIMEOUT = 5.0
SILENT_PROBES = 3  # without an answer in time: a busy machine may be late
# A session leaves its replica when that has this much more to do than the average.
OVERLOAD, SLACK = 1.25, 4

log = logging.getLogger(__name__)


class Replica:
    def __init__(self, index: int, settings: ReplicaSettings) -> None:
        self.index = index
        self.url = settings.url.rstrip("/")
        self.rank = settings.data_parallel_rank
        self.name = f"{self.url} {self.rank}"  # what sessions hash: independent of the order in the file
        self.up = False
        self.running = 0  # requests sent and not ended
        self.silent = 0  # probes without an answer, in a row
        self.doubted = asyncio.Event()  # asks for a probe before its time

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
        """Note that a replica answers, or no longer."""
        replica.silent = 0
        if replica.up == up:
            return
        replica.up = up
        log.warning("replica %d (%s) is %s", replica.index, replica.url, "up" if up else f"down: {why}")
        self.changed()

    async def probe(self, client: httpx.AsyncClient, replica: Replica) -> None:
        """Ask /health once. One that refuses the connection or says that it is unwell is down at once."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                status = (await client.get(f"{replica.url}/health")).status_code
        except httpx.ConnectError as error:
            self.mark(replica, False, str(error) or type(error).__name__)
        except (TimeoutError, httpx.HTTPError):
            replica.silent += 1
            if replica.silent >= SILENT_PROBES:
                self.mark(replica, False, f"no answer to {replica.silent} probes")
        else:
            self.mark(replica, status == 200, f"/health answers {status}")

    async def watch(self, client: httpx.AsyncClient) -> None:
        """Probe every replica for ever."""

        async def one(replica: Replica) -> None:
            while True:
                await self.probe(client, replica)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_SECONDS):
                        await replica.doubted.wait()
                replica.doubted.clear()

        async with asyncio.TaskGroup() as tasks:
            for replica in self.all:
                tasks.create_task(one(replica))
