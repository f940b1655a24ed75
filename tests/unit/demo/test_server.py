"""Servers that tests, demo and benchmarks start work beside others: each is given its size."""

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_demo import demo
from kimi_demo.server import Server
from tests.support import patience

ROOT = Path(__file__).resolve().parents[3]
# Ends as vLLM's workers do: killed, with shared memory that nobody but the resource tracker unlinks.
WORKER = """
import signal
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=64)
print(memory.name, flush=True)
def serve_for_ever():
    signal.pause()
serve_for_ever()
"""


def test_a_server_without_a_size_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    server = Server("model", ["--max-model-len=512"], log_path=tmp_path / "log")
    with pytest.raises(ValueError, match=r"serve model .* sets no memory size: add --kv-cache-memory-bytes, such as"):
        server.start()
    assert server.process is None and not server.log


def test_the_demo_asks_for_little_of_either_memory() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "serve"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in (shown.splitlines()[-1].replace(" ", "="), "=".join(demo.FLAGS)):
        assert "--kv-cache-memory-bytes=" in command and "--gpu-memory-utilization=0.1" in command


class WorkerServer(Server):
    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", WORKER, "--memory"]


def started(folder: Path) -> WorkerServer:
    server = WorkerServer("model", log_path=folder / "log")
    server.launch()
    while not server.log.endswith("\n"):
        assert server.process is not None and server.process.poll() is None, server.log
    return server


def test_a_stopped_server_leaves_no_shared_memory(tmp_path: Path) -> None:
    server = started(tmp_path)
    memory = Path("/dev/shm", server.log.strip())
    assert memory.exists()
    server.stop()
    assert not memory.exists()


def test_a_server_waited_for_in_vain_shows_where_it_stands(tmp_path: Path) -> None:
    server = started(tmp_path)
    memory = Path("/dev/shm", server.log.strip())
    try:
        try:
            raise TimeoutError
        except TimeoutError as error:
            raise RuntimeError from error
    except RuntimeError as error:
        assert patience.is_lost(error) and not patience.is_lost(ValueError())
    assert "in serve_for_ever" in patience.stacks([server])
    server.stop()
    memory.unlink(missing_ok=True)
