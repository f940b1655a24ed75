"""Start `vllm serve` as a child process and wait until it answers: for the demo, the tests and the benchmarks."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from kimi_server.vllm_program import vllm_program

# No model hub and no reporting. Threads unbound: by default vLLM ties each worker to cores from the first one on and
# keeps others for its front end, which on a small machine is half of it, and the same half for every server.
DEFAULT_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# On a CPU vLLM gives a single worker a process of its own, too, to bind its threads to cores. Where none are bound, a
# server without that process starts sooner.
ONE_PROCESS = "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor"

# What tells a server its size; `--memory` is that of `kimi-linear serve`.
SIZES = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--memory")


class StartError(RuntimeError):
    """The server ended, or stayed silent, before it was ready; `log` holds what it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n{log[-6000:]}")
        self.log = log


def free_port() -> int:
    """A TCP port on the loopback interface that nobody has.

    It is below those that outgoing connections are given: none of these may take it while its server still starts.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports tried on the loopback interface is free")


def _is_alive(group: int) -> bool:
    """Whether a process of this group runs; one that has ended and waits for its parent does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, its_group, *_ = stat.read_bytes().rpartition(b")")[2].split()  # a name is any bytes
            if int(its_group) == group and state != b"Z":
                return True
    return False


class Server:
    """`vllm serve MODEL *flags` on a free loopback port; a context manager that stops it and its children.

    The command has to name a size: a server without one takes most of the memory, and does not start beside another.
    `log_path` receives everything the server prints. Its environment is DEFAULT_ENV, over it this process's
    own, over that `env`.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Sequence[str] = (),
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.model = str(model)
        self.flags = [str(flag) for flag in flags]
        self.log_path = log_path
        self.env = {**DEFAULT_ENV, **os.environ, **(env or {})}
        self.port = free_port()
        self.process: subprocess.Popen | None = None
        self.launched = 0.0  # by time.monotonic

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        return [*vllm_program(), "serve", self.model, "--host", "127.0.0.1", "--port", str(self.port), *self.flags]

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self, timeout: float = 300, waiting: Callable[[float], None] | None = None) -> "Server":
        """Start and return when /health answers. Raises what `launch` and `wait` raise."""
        self.launch()
        return self.wait(timeout, waiting)

    def launch(self) -> None:
        """Start the process; raises ValueError if nothing names the server's size."""
        if not any(word.startswith(SIZES) for word in self.command) and "VLLM_CPU_KVCACHE_SPACE" not in self.env:
            raise ValueError(f"{' '.join(self.command)} sets no memory size: add {SIZES[0]}, such as 256M")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            # A session of its own, so that stop() reaches the engine and worker processes as well.
            self.launched = time.monotonic()
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )

    def wait(self, timeout: float = 300, waiting: Callable[[float], None] | None = None) -> "Server":
        """Return when /health answers; raises StartError if the process ends or is `timeout` seconds old.

        `waiting` is called with its age in seconds, four times a second.
        """
        assert self.process is not None
        while not self.is_healthy():
            seconds = time.monotonic() - self.launched
            if self.process.poll() is not None:
                raise StartError(f"vllm serve ended with status {self.process.returncode}.", self.log)
            if seconds > timeout:
                self.stop()
                raise StartError(f"vllm serve was not ready after {timeout:.0f} s.", self.log)
            if waiting:
                waiting(seconds)
            time.sleep(0.25)
        return self

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, timeout: float = 20) -> None:
        """Ask the server to end, then end every process of its session."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
            # vLLM kills its workers; Python's resource tracker then unlinks what they had in /dev/shm, and ends.
            until = time.monotonic() + 5
            while _is_alive(process.pid) and time.monotonic() < until:
                time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
