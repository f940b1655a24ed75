"""A bound on the memory that request bodies take together."""

import asyncio

SMALL_BYTES = 65536  # bodies up to this size never wait


class BodyReservation:
    """Memory reserved for one body."""

    def __init__(self, budget: "BodyBudget", size: int) -> None:
        self.budget, self.size = budget, size

    def shrink(self, size: int) -> None:
        """Give back what is reserved beyond `size` bytes."""
        if size < self.size:
            self.budget.reserved -= self.size - size
            self.size = size
            self.budget.freed.set()

    def release(self) -> None:
        """Give all of it back; further calls do nothing."""
        self.shrink(0)


class BodyBudget:
    """At most `max_bytes` of bodies at once, in order of arrival. Small bodies count but do not wait."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.reserved = max_bytes, 0
        self.turn, self.freed = asyncio.Lock(), asyncio.Event()

    async def reserve(self, size: int) -> BodyReservation:
        """Wait for room for `size` bytes. A body larger than the whole budget is let in when there is no other."""
        if size > SMALL_BYTES:
            async with self.turn:
                while self.reserved and self.reserved + size > self.max_bytes:
                    self.freed.clear()
                    await self.freed.wait()
                self.reserved += size
        else:
            self.reserved += size
        return BodyReservation(self, size)
