"""Processes that begin with vLLM imported: forked from one that has imported it and waits.

On two slow cores an import takes 20 s, and a server of one rank has two. `fork` runs a module as `python -m` does, and
what that spawns is forked, too. Where something reads the environment while it is imported, nothing is forked.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker")
# Variables that nothing looks at before a server starts. The plugin is not imported beforehand.
READ_LATE = {
    *("HF_HUB_OFFLINE", "KIMI_LINEAR_UNSUPPORTED_VLLM", "KIMI_TEST_REPLICA", "RUN", "VLLM_CPU_OMP_THREADS_BIND"),
    *("PYTHONPATH", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"),
}
LOCK = threading.Lock()
THREADS = {"OMP_NUM_THREADS": "1"}  # more than one would not survive a fork


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a process with these variables besides its parent's would be the same if it was forked."""
    late = all(name in READ_LATE or THREADS.get(name) == value for name, value in environment.items())
    return late and is_compiled()


@functools.cache
def is_compiled() -> bool:
    """Whether vLLM is there with its compiled parts: those of `tests/newer_vllm.py` cannot be imported whole."""
    found = importlib.util.find_spec("vllm")
    places = found.submodule_search_locations if found else None
    return any(path for place in places or () for path in Path(place).glob("*.so"))


class Forked:
    """What a Popen is for a process that was forked, as far as tests need it."""

    def __init__(self, waiting: "Waiting", pid: int) -> None:
        self.waiting, self.pid = waiting, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.waiting.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class Waiting:
    """The process that has imported vLLM, as its parent sees it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **THREADS},
            start_new_session=True,
        )
        atexit.register(self.process.kill)

    def ask(self, task: dict[str, Any]) -> int | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.lock:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer: int | None = json.loads(self.process.stdout.readline())
        return answer


@functools.cache
def _waiting() -> Waiting:
    return Waiting()


def waiting() -> Waiting:
    """One for all of this process."""
    with LOCK:
        return _waiting()


def fork(module: str, arguments: Iterable[str], log: Path, environment: Mapping[str, str]) -> Forked:
    """`python -m module *arguments` in a session of its own with this environment and no other; prints to `log`."""
    task = {"module": module, "arguments": list(arguments), "log": str(log), "environment": dict(environment)}
    pid = waiting().ask(task)
    assert pid is not None
    return Forked(waiting(), pid)


def serve() -> dict[str, Any] | None:
    """Answer the parent until it ends; in a forked process the task of that."""
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        answer: int | None = None
        if "poll" not in task:
            if (answer := os.fork()) == 0:
                return task
        else:
            ended, status = os.waitpid(task["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)
    return None


def become(module: str, arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    """Go on as a process that a shell has started."""
    os.setsid()
    for place, opened in (
        (0, os.open(os.devnull, os.O_RDONLY)),
        (1, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
    ):
        os.dup2(opened, place)
    os.dup2(1, 2)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    resource_tracker.ensure_running()  # where processes are spawned theirs is the first one's; vLLM kills all others
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)  # type: ignore
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        for name in IMPORTED:
            importlib.import_module(name)
    gc.freeze()  # what is imported stays where it is, shared by all
    if (given := serve()) is not None:
        become(**given)
