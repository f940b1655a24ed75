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

from kimi_server.errors import Refusal

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
        async with self.turn:
            if self.pool is None:
                context = multiprocessing.get_context("spawn")
                self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_stay_while_needed)
            try:
                # Whoever is cancelled meanwhile still waits, so that no body is left behind in the pool.
                work = asyncio.get_running_loop().run_in_executor(self.pool, how, body)
                await asyncio.wait({work})
                return work.result()
            except BrokenProcessPool:
                self.close()
                message = "The process that reads large bodies was lost: try again, or send a smaller one."
                raise Refusal(503, "reader_lost", message, 1) from None

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
