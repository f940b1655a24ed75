"""Admission control: a budget of prefill tokens for each replica, two lanes, fair queues. Pure asyncio, no HTTP.

Each replica may have `prefill_tokens` outstanding, `short_reserve` of them for short prompts only. Short prompts use
the rest too while no long one waits for it. A prompt without room waits in its key's queue, and keys take turns (round
robin). The head of a lane is never overtaken within it, so a large prompt cannot starve.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kimi_server.gateway.config.settings import AdmissionSettings
from kimi_server.gateway.errors import GatewayError, draining, no_replica

Lane = Literal["short", "long"]
LANES: tuple[Lane, ...] = ("short", "long")
RETRY_SECONDS = 5

# Returns the indexes of the replicas that are up, the preferred one first.
Candidates = Callable[[], Sequence[int]]


@dataclass
class Grant:
    """Permission to send one prompt to `replica`.

    `release()` gives its tokens back to the budget; further calls do nothing.
    """

    replica: int
    lane: Lane
    tokens: int
    waited: float  # seconds
    affinity_miss: bool  # not the preferred replica
    reading: int  # tokens of other prompts that the replica reads
    on_release: Callable[["Grant"], None] = field(repr=False)
    held: bool = True

    def release(self) -> None:
        if self.held:
            self.held = False
            self.on_release(self)


@dataclass(eq=False)
class Waiter:
    key: str
    lane: Lane
    tokens: int
    candidates: Candidates
    since: float
    granted: asyncio.Future[Grant]

    @property
    def waits(self) -> bool:
        """False for one that is cancelled, and not yet removed."""
        return not self.granted.done()


class Admission:
    """`outstanding[replica][lane]`: tokens of admitted prompts whose first token has not come yet."""

    def __init__(self, settings: AdmissionSettings, replicas: int) -> None:
        self.settings = settings
        self.outstanding: list[dict[Lane, int]] = [dict.fromkeys(LANES, 0) for _ in range(replicas)]
        self.queues: dict[Lane, OrderedDict[str, deque[Waiter]]] = {lane: OrderedDict() for lane in LANES}
        self.closed = False

    def lane_of(self, tokens: int) -> Lane:
        return "short" if tokens <= self.settings.short_prompt else "long"

    def waiting(self, lane: Lane) -> int:
        return sum(1 for queue in self.queues[lane].values() for waiter in queue if waiter.waits)

    async def enter(self, key: str, tokens: int, candidates: Candidates) -> Grant:
        """Wait for room for a prompt of `tokens`; one larger than the long prompts' budget takes all of it.

        Raises GatewayError 503 when the queue is full, the deadline passes or no replica is up.
        """
        lane = self.lane_of(tokens)
        if lane == "long":
            tokens = min(tokens, self.settings.prefill_tokens - self.settings.short_reserve)
        loop = asyncio.get_running_loop()
        waiter = Waiter(key, lane, max(1, tokens), candidates, loop.time(), loop.create_future())
        self.queues[lane].setdefault(key, deque()).append(waiter)
        try:
            self.dispatch()
            if sum(map(self.waiting, LANES)) > self.settings.queue:
                self._reject_one()
            async with asyncio.timeout(self.settings.deadline_seconds):
                return await waiter.granted
        except BaseException as error:
            self._leave(waiter)
            if not isinstance(error, TimeoutError):
                raise
            seconds = self.settings.deadline_seconds
            message = f"No room for this prompt within {seconds:g} seconds: try again later."
            raise GatewayError(503, "deadline", message, RETRY_SECONDS) from None

    def dispatch(self) -> None:
        """Admit all that have room. To be called when room is freed, and when a replica goes up or down."""
        for lane in LANES:
            queues = self.queues[lane]
            while queues:
                waiter = next(iter(queues.values()))[0]
                candidates = waiter.candidates()
                if not waiter.waits:
                    self._remove(waiter)
                elif self.closed or not candidates:
                    self._remove(waiter)
                    waiter.granted.set_exception(draining() if self.closed else no_replica())
                elif (replica := self._place(waiter, candidates)) is not None:
                    self._remove(waiter)
                    if waiter.key in queues:
                        queues.move_to_end(waiter.key)
                    reading = sum(self.outstanding[replica].values())
                    self.outstanding[replica][lane] += waiter.tokens
                    waited = asyncio.get_running_loop().time() - waiter.since
                    affinity_miss = replica != candidates[0]
                    grant = Grant(replica, lane, waiter.tokens, waited, affinity_miss, reading, self._release)
                    waiter.granted.set_result(grant)
                else:
                    break

    def close(self) -> None:
        """Reject all that wait, and all that come later."""
        self.closed = True
        self.dispatch()

    def _place(self, waiter: Waiter, candidates: Sequence[int]) -> int | None:
        """The replica to use; None where there is no room.

        A short prompt prefers a replica without a long prefill to its own: its prefix is soon computed again.
        """
        with_room = [replica for replica in candidates if self._has_room(replica, waiter)]
        if waiter.lane == "short":
            with_room.sort(key=lambda replica: self.outstanding[replica]["long"] > 0)
        return with_room[0] if with_room else None

    def _has_room(self, replica: int, waiter: Waiter) -> bool:
        outstanding, settings = self.outstanding[replica], self.settings
        of_lane = outstanding[waiter.lane] + waiter.tokens
        if sum(outstanding.values()) + waiter.tokens > settings.prefill_tokens:
            return False
        if waiter.lane == "long":
            return of_lane <= settings.prefill_tokens - settings.short_reserve
        return of_lane <= settings.short_reserve or not self.queues["long"]

    def _release(self, grant: Grant) -> None:
        self.outstanding[grant.replica][grant.lane] -= grant.tokens
        self.dispatch()

    def _remove(self, waiter: Waiter) -> None:
        queue = self.queues[waiter.lane].get(waiter.key)
        if queue and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self.queues[waiter.lane][waiter.key]

    def _leave(self, waiter: Waiter) -> None:
        """Remove a waiter whose request ended, and release a grant that it got in the same moment."""
        self._remove(waiter)
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()
        self.dispatch()

    def _reject_one(self) -> None:
        """Reject the newest prompt of the key that has most of them waiting, both lanes together."""
        waiting: dict[str, list[Waiter]] = {}
        for lane in LANES:
            for key, queue in self.queues[lane].items():
                waiting.setdefault(key, []).extend(waiter for waiter in queue if waiter.waits)
        longest = max(waiting.values(), key=lambda waiters: len(waiters))
        last = max(longest, key=lambda waiter: waiter.since)
        self._remove(last)
        message = f"{self.settings.queue} requests wait already: try again later."
        last.granted.set_exception(GatewayError(503, "queue_full", message, RETRY_SECONDS))
