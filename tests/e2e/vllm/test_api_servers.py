"""Two API servers in front of one engine: the numbers at /metrics are the engine's, whichever of them heard of them."""

import time
from collections.abc import Callable
from pathlib import Path

from kimi_demo.server import Server
from tests.support.completions import Completions
from tests.support.prompts import Stream

FLAGS = (
    "--dtype=float32",
    "--max-model-len=1024",
    "--kv-cache-memory-bytes=64M",
    "--num-gpu-blocks-override=24",
    "--api-server-count=2",
)
HELD, EVICTED = "kimi_linear_snapshots_held", "kimi_linear_snapshots_evicted_total"


def test_no_snapshot_is_counted_twice(servers: Callable[..., Server], demo_model: Path) -> None:
    """What was ever kept is held or was evicted: of each prompt as many states as of the first, before any gave way."""
    server = Completions(servers(demo_model, *FLAGS))
    stream = Stream(1000, seed=31)

    def counts() -> tuple[float, float]:
        return server.metric(HELD), server.metric(EVICTED)

    def kept(states: float) -> None:
        """Wait until the API servers have heard of so many."""
        deadline = time.monotonic() + 60
        while sum(counts()) != states and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sum(counts()) == states, counts()

    server.one_by_one([(stream.prompt(700), 2)])
    deadline = time.monotonic() + 60
    while not server.metric(HELD) and time.monotonic() < deadline:
        time.sleep(0.1)
    first, evicted = counts()
    assert first > 0 and evicted == 0
    for number in range(2, 12):  # each with a connection of its own, to one of the two
        server.one_by_one([(stream.prompt(700), 2)])
        kept(number * first)
    assert server.metric(EVICTED) > first
    assert server.metric("vllm:request_success_total") == 11
