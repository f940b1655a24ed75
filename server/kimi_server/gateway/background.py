"""Background tasks that do not die in silence."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds

log = logging.getLogger(__name__)


async def keep_doing(what: str, once: Callable[[], Awaitable[None]]) -> NoReturn:
    """Do `once` for ever. An exception is logged, as one of `what`, and the next time comes after a longer pause."""
    pause = FIRST_PAUSE
    while True:
        try:
            await once()
        except Exception:
            log.exception("%s failed; the next try comes in %g seconds", what, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            pause = FIRST_PAUSE
