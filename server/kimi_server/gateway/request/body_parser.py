"""Where bodies are read: small ones here, large ones one at a time in a process of its own.

A parser holds the interpreter from beginning to end, in a thread too, and all streams would wait for it.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from kimi_server.gateway.errors import Refusal

HERE_BYTES = 128 << 10  # read in the event loop; some milliseconds at worst

T = TypeVar("T")


class Reader:
    """The process starts with the first large body."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.pool: ProcessPoolExecutor | None = None

    async def read(self, how: Callable[[bytes], T], body: bytes) -> T:
        """`how(body)`; raises what it raises, and Refusal where the process is lost."""
        if len(body) <= HERE_BYTES:
            return how(body)
        await self.turn.acquire()
        try:
            work = self._give(how, body)
        except BaseException:
            self.turn.release()
            raise
        # Not when its client leaves, but when it is done with: bodies would pile up in the pool.
        work.add_done_callback(lambda _: self.turn.release())
        try:
            return await asyncio.shield(work)
        except BrokenProcessPool:
            self.close()
            message = "The process that reads large bodies was lost: try again, or send a smaller one."
            raise Refusal(503, "reader_lost", message, 1) from None

    def _give(self, how: Callable[[bytes], T], body: bytes) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        if self.pool is not None:
            try:
                return loop.run_in_executor(self.pool, how, body)
            except BrokenProcessPool:  # it died while it had nothing to do
                self.close()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_stay_while_needed)
        return loop.run_in_executor(self.pool, how, body)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None


def _stay_while_needed() -> None:
    """Leave Ctrl-C to the gateway, and end when it ends, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
