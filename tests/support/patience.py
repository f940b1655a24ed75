"""How long a test waits for what should come, and what servers were doing that let it wait longer."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable

from kimi_demo.server import Server

SECONDS = 600  # says that something hangs, not that the machine is slow: beside other suites a step takes minutes


def is_lost(error: BaseException | None) -> bool:
    """Whether this, or what led to it, is a wait that was given up."""
    return error is not None and (
        "timeout" in type(error).__name__.lower() or is_lost(error.__cause__) or is_lost(error.__context__)
    )


def stacks(servers: Iterable[Server]) -> str:
    """End these servers, which have PYTHONFAULTHANDLER; returns the ends of their logs, with all threads' stacks."""
    shown = []
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGABRT)
            time.sleep(2)
            shown.append(f"{' '.join(server.command)}\n{server.log[-20_000:]}")
    return "\n\n".join(shown)
