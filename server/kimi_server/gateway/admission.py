"""Who may send a prompt to which replica, and when: budgets, lanes, queues. Pure asyncio, no HTTP.

Each replica may have so many prefill tokens outstanding. Long prompts never use the part reserved for short ones; short
ones use the rest too while no long one waits for it. Whoever finds no room waits, each key in its own line, and keys
take turns. A line's first is never overtaken in its lane, so a large prompt cannot starve.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kimi_server.gateway.config.settings import AdmissionSettings
from kimi_server.gateway.errors import Refusal, no_replica, stopping

Lane = Literal["short", "long"]
LANES: tuple[Lane, ...] = ("short", "long")
RETRY_SECONDS = 5

# Indexes of the replicas that can take a request now, the best first; empty while none is up.
Candidates = Callable[[], Sequence[int]]


@dataclass
class Grant:
    """Leave to send one prompt to `replica`; `release()` gives its tokens back, the first time it is called."""

    replica: int
    lane: Lane
    tokens: int
    waited: float  # s
    spilled: bool  # not the replica that was wanted most
    give_back: Callable[["Grant"], None] = field(repr=False)
    held: bool = True

    def release(self) -> None:
        if self.held:
            self.held = False
            self.give_back(self)


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
        """False for one whose request was cancelled and has not had its turn to leave."""
        return not self.granted.done()


class Admission:
    """`outstanding[replica][lane]` are tokens of prompts that were let in and gave no first token yet."""

    def __init__(self, settings: AdmissionSettings, replicas: int) -> None:
        self.settings = settings
        self.outstanding: list[dict[Lane, int]] = [dict.fromkeys(LANES, 0) for _ in range(replicas)]
        self.lines: dict[Lane, OrderedDict[str, deque[Waiter]]] = {lane: OrderedDict() for lane in LANES}
        self.closed = False

    def lane_of(self, tokens: int) -> Lane:
        return "short" if tokens <= self.settings.short_prompt else "long"

    def waiting(self, lane: Lane) -> int:
        return sum(1 for line in self.lines[lane].values() for waiter in line if waiter.waits)

    async def enter(self, key: str, tokens: int, candidates: Candidates) -> Grant:
        """Wait for room for a prompt of `tokens`; one larger than the budget of long prompts takes all of that.

        Raises Refusal when the queue is full, the deadline passes or no replica is up.
        """
        lane = self.lane_of(tokens)
        if lane == "long":
            tokens = min(tokens, self.settings.prefill_tokens - self.settings.short_reserve)
        loop = asyncio.get_running_loop()
        waiter = Waiter(key, lane, max(1, tokens), candidates, loop.time(), loop.create_future())
        self.lines[lane].setdefault(key, deque()).append(waiter)
        try:
            self.dispatch()
            if sum(map(self.waiting, LANES)) > self.settings.queue:
                self._turn_away()
            async with asyncio.timeout(self.settings.deadline_seconds):
                return await waiter.granted
        except BaseException as error:
            self._leave(waiter)
            if not isinstance(error, TimeoutError):
                raise
            seconds = self.settings.deadline_seconds
            message = f"No room for this prompt within {seconds:g} seconds: try again later."
            raise Refusal(503, "deadline", message, RETRY_SECONDS) from None

    def dispatch(self) -> None:
        """Let in whoever has room now. To be called when room, or the replicas that are up, changed."""
        for lane in LANES:
            lines = self.lines[lane]
            while lines:
                waiter = next(iter(lines.values()))[0]
                candidates = waiter.candidates()
                if not waiter.waits:
                    self._remove(waiter)
                elif self.closed or not candidates:
                    self._remove(waiter)
                    waiter.granted.set_exception(stopping() if self.closed else no_replica())
                elif (replica := self._place(waiter, candidates)) is not None:
                    self._remove(waiter)
                    if waiter.key in lines:
                        lines.move_to_end(waiter.key)
                    self.outstanding[replica][lane] += waiter.tokens
                    waited = asyncio.get_running_loop().time() - waiter.since
                    spilled = replica != candidates[0]
                    grant = Grant(replica, lane, waiter.tokens, waited, spilled, self._give_back)
                    waiter.granted.set_result(grant)
                else:
                    break

    def close(self) -> None:
        """Refuse all who wait, and all who come."""
        self.closed = True
        self.dispatch()

    def _place(self, waiter: Waiter, candidates: Sequence[int]) -> int | None:
        """The replica to use. A short prompt rather goes where no long one is being read than where it was before:
        its prefix is soon read again."""
        places = [replica for replica in candidates if self._has_room(replica, waiter)]
        if waiter.lane == "short":
            places.sort(key=lambda replica: self.outstanding[replica]["long"] > 0)
        return places[0] if places else None

    def _has_room(self, replica: int, waiter: Waiter) -> bool:
        outstanding, settings = self.outstanding[replica], self.settings
        of_lane = outstanding[waiter.lane] + waiter.tokens
        if sum(outstanding.values()) + waiter.tokens > settings.prefill_tokens:
            return False
        if waiter.lane == "long":
            return of_lane <= settings.prefill_tokens - settings.short_reserve
        return of_lane <= settings.short_reserve or not self.lines["long"]

    def _give_back(self, grant: Grant) -> None:
        self.outstanding[grant.replica][grant.lane] -= grant.tokens
        self.dispatch()

    def _remove(self, waiter: Waiter) -> None:
        line = self.lines[waiter.lane].get(waiter.key)
        if line and waiter in line:
            line.remove(waiter)
            if not line:
                del self.lines[waiter.lane][waiter.key]

    def _leave(self, waiter: Waiter) -> None:
        """Forget a waiter whose request ended; what it was given in the same moment is given back."""
        self._remove(waiter)
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()
        self.dispatch()

    def _turn_away(self) -> None:
        """Refuse the last one in the line of the key with the most waiting, in either lane."""
        waiting: dict[str, list[Waiter]] = {}
        for lane in LANES:
            for key, line in self.lines[lane].items():
                waiting.setdefault(key, []).extend(waiter for waiter in line if waiter.waits)
        longest = max(waiting.values(), key=lambda waiters: len(waiters))
        last = max(longest, key=lambda waiter: waiter.since)
        self._remove(last)
        message = f"{self.settings.queue} requests wait already: try again later."
        last.granted.set_exception(Refusal(503, "queue_full", message, RETRY_SECONDS))
