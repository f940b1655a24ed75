"""Fixtures that every test may use: the demo checkpoint and running servers, one for each distinct set of flags."""

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import cast

import pytest

from kimi_demo import checkpoint
from kimi_demo.server import ONE_PROCESS, Server
from kimi_server.vllm_program import vllm_program
from tests.support import patience, warm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")
# vLLM's own patience with a step is longer than a test's, so that the test finds the processes as they stand.
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(2 * patience.SECONDS))

# fp32 with a small cache and a small token budget, so that prompts are prefilled in several chunks.
FLAGS = (
    "--dtype=float32",
    "--max-model-len=8192",
    "--kv-cache-memory-bytes=256M",  # small enough that blocks are soon used again
    "--max-num-batched-tokens=1024",
    "--no-enable-prefix-caching",
    "--enable-auto-tool-choice",
    "--tool-call-parser=kimi_k2",
)
CORES = sorted(os.sched_getaffinity(0))
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}  # the environment of a server with two workers
ON_A_CPU = metadata.version("torch").endswith("+cpu")
SPREAD = (
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--distributed-executor-backend",
)
SET_BEFORE_IMPORTS = ("--api-server-count",)  # what changes the environment for what vLLM imports later
MOST_SERVERS = 2  # alive at once: a small machine has neither the memory nor the cores for more


class WarmServer(Server):
    """A server that is not started by its command, but forked from a process that has imported vLLM."""

    def launch(self) -> None:
        self.launched = time.monotonic()
        arguments = self.command[len(vllm_program()) :]
        forked = warm.fork("vllm.entrypoints.cli.main", arguments, self.log_path, self.env)
        self.process = cast(subprocess.Popen, forked)


class ServerPool:
    """Starts a server for a (model, flags, env) when first asked, shares it, and retires the oldest."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.servers: dict[tuple, Server] = {}
        self.started = 0

    def __call__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> Server:
        key = (str(model), flags, tuple(sorted((env or {}).items())))
        server = self.servers.pop(key, None)
        if server is None:
            while len(self.servers) >= MOST_SERVERS:
                self.servers.pop(next(iter(self.servers))).stop()
            self.started += 1
            # One thread a server: the demo model is too small for more, and idle OpenMP threads spin.
            env = {"OMP_NUM_THREADS": "1", **(env or {})}
            if ON_A_CPU and not any(flag.startswith(SPREAD) for flag in flags):
                flags = (*flags, ONE_PROCESS)
            early = any(flag.startswith(SET_BEFORE_IMPORTS) for flag in flags)
            kind = WarmServer if ON_A_CPU and warm.can_fork(env) and not early else Server
            server = kind(model, flags, env=env, log_path=self.logs / f"server-{self.started}.log")
            server.start(patience.SECONDS)
        self.servers[key] = server
        return server

    def close(self) -> None:
        for server in self.servers.values():
            server.stop()
        self.servers.clear()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint of seed 0."""
    path = tmp_path_factory.mktemp("demo")
    checkpoint.main(["--out", str(path)])
    return path


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`servers(model, *flags, env=...)`: a running server with those flags, shared by the whole session."""
    pool = ServerPool(tmp_path_factory.mktemp("servers"))
    yield pool
    pool.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that waited in vain shows what its servers were doing."""
    report = yield
    if call.excinfo is not None and patience.is_lost(call.excinfo.value):
        given = getattr(item, "funcargs", {}).values()
        pools = [pool.servers.values() for pool in given if isinstance(pool, ServerPool)]
        alone = [server for server in given if isinstance(server, Server)]
        report.sections.append(("servers", patience.stacks([*itertools.chain(*pools), *alone])))
    return report
