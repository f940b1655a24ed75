"""The bytes of bodies that are held at once, and how they go on to a replica."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

SMALL_BYTES = 65536  # of a body that never waits for others
PIECE_BYTES = 256 << 10


class Held:
    """Room for a body, given back once."""

    def __init__(self, bodies: "Bodies", size: int) -> None:
        self.bodies, self.size = bodies, size

    def shrink(self, size: int) -> None:
        """Give back what is more than `size` bytes."""
        if size < self.size:
            self.bodies.held -= self.size - size
            self.size = size
            self.bodies.freed.set()

    def release(self) -> None:
        self.shrink(0)


class Bodies:
    """At most `most` bytes, but for small bodies; who comes first is first."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.door, self.freed = asyncio.Lock(), asyncio.Event()

    async def hold(self, size: int) -> Held:
        """Wait for room for `size` bytes; one larger than all the room is let in alone."""
        if size > SMALL_BYTES:
            async with self.door:
                while self.held and self.held + size > self.most:
                    self.freed.clear()
                    await self.freed.wait()
                self.held += size
        else:
            self.held += size
        return Held(self, size)


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body as it is sent, so that no second copy of it waits in a buffer."""
    for at in range(0, len(body), PIECE_BYTES):
        yield body[at : at + PIECE_BYTES]


def with_fields(body: bytes, fields: dict[str, Any]) -> bytes:
    """A JSON object with these fields, too.

    They are put last, and of a name that stands twice Python's parser, which vLLM uses, takes the last: a value that
    the client gave is replaced, and nothing else of its bytes changes.
    """
    if not fields:
        return body
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return body[:end] + comma + json.dumps(fields)[1:].encode() + body[end + 1 :]
