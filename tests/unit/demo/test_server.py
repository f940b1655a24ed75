"""Servers that tests, demo and benchmarks start work beside others: each is given its size."""

import subprocess
from pathlib import Path

import pytest

from kimi_demo import demo
from kimi_demo.server import Server

ROOT = Path(__file__).resolve().parents[3]


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
