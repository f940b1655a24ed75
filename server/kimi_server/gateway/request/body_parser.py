"""Parses bodies without blocking the event loop: small ones in it, large ones one at a time in another process.

A thread would not do: the parser holds the GIL until it is done, and all streams would wait for it.
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

from kimi_server.gateway.errors import GatewayError

INLINE_BYTES = 128 << 10  # bodies up to this size are parsed in the event loop: some milliseconds at worst

T = TypeVar("T")


class BodyParser:
    """Its process starts with the first large body."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.pool: ProcessPoolExecutor | None = None

    async def parse(self, function: Callable[[bytes], T], body: bytes) -> T:
        """`function(body)`; raises what it raises, and GatewayError 503 where the process died."""
        if len(body) <= INLINE_BYTES:
            return function(body)
        await self.turn.acquire()
        try:
            work = self._submit(function, body)
            pool = self.pool
        except BaseException:
            self.turn.release()
            raise
        # Released when the parser is done, not when the client leaves: else bodies would pile up in the pool.
        work.add_done_callback(lambda _: self.turn.release())
        try:
            return await asyncio.shield(work)
        except BrokenProcessPool:
            if self.pool is pool:  # not the one that the next body started
                self.close()
            message = "The process that parses large bodies died: try again, or send a smaller one."
            raise GatewayError(503, "reader_lost", message, 1) from None

    def _submit(self, function: Callable[[bytes], T], body: bytes) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        if self.pool is not None:
            try:
                return loop.run_in_executor(self.pool, function, body)
            except BrokenProcessPool:  # it died while idle
                self.close()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        return loop.run_in_executor(self.pool, function, body)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None


def _end_with_parent() -> None:
    """In the pool's process: ignore Ctrl-C, and exit when the gateway's process ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=watch_parent, daemon=True).start()
