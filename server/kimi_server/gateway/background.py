"""Background tasks that survive exceptions."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds

log = logging.getLogger(__name__)


async def repeat_forever(name: str, step: Callable[[], Awaitable[None]]) -> NoReturn:
    """Await `step()` again and again.

    An exception is logged with the task's `name`; each one in a row doubles the pause before the next try.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            await step()
        except Exception:
            log.exception("%s failed; it is tried again in %g seconds", name, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            pause = FIRST_PAUSE
