"""A prefix that has left the cache comes back from vLLM's offloading connector, latents and states, and is exact.

The connector's scheduler and manager are vLLM's own; the copies are made by `tests/support/host_offloading.py`, for
vLLM's own need a GPU. The cache is so small that each prompt evicts the one before.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import TWO_WORKERS
from tests.support.completions import Completions
from tests.support.load import mixed
from tests.support.prompts import Case, Stream, check, draw_cases
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes


def connector(host_bytes: int, spec: str = "HostOffloadingSpec", **more: Any) -> str:
    settings = {
        "cpu_bytes_to_use": host_bytes,
        "spec_name": spec,
        "spec_module_path": "tests.support.host_offloading",
        **more,
    }
    offloading = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    return f"--kv-transfer-config={json.dumps(offloading)}"


FLAGS = (
    "--dtype=float32",
    "--max-model-len=2048",
    "--kv-cache-memory-bytes=256M",
    "--max-num-batched-tokens=256",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
)
ENV = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
NGRAM = '--speculative-config={"method":"ngram","num_speculative_tokens":2,"prompt_lookup_max":3}'
# Blocks of 16 tokens, one for the state of each KDA layer: one prompt of 700 tokens fills half of them.
HOST = connector(1 << 28)  # more than all prompts take
SMALL = ("--block-size=16", "--num-gpu-blocks-override=180", '--additional-config={"check_states": true}')
WAYS = {
    "one rank": (*SMALL, HOST),
    "two ranks": (*SMALL, HOST, "--tensor-parallel-size=2"),
    "drafts": (*SMALL, HOST, NGRAM),
    "blocks of the default size": ("--num-gpu-blocks-override=26", HOST),
}
TOKENS = 16
SOAK = ("two ranks", "drafts", "blocks of the default size")


@pytest.fixture(params=[pytest.param(way, marks=pytest.mark.soak if way in SOAK else ()) for way in WAYS])
def offloading(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    env = ENV | (TWO_WORKERS if request.param == "two ranks" else {})
    return Completions(servers(demo_model, *FLAGS, *WAYS[request.param], env=env))


@pytest.fixture(scope="session")
def documents(reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path) -> list[Case]:
    stream = Stream(vocab, seed=51)
    server = Completions(servers(demo_model, *FLAGS))
    wanted = [(lambda length=length: stream.prompt(length), TOKENS) for length in (700, 650, 900, 16 * 40, 333, 1200)]
    return draw_cases(reference, wanted, server.at_once)


def loaded(server: Completions, source: str = "host") -> float:
    """Tokens of prompts."""
    return server.metric("vllm:prompt_tokens_cached_by_source_total", source=source)


def test_what_was_evicted_comes_back(documents: list[Case], offloading: Completions):
    check(documents, offloading.one_by_one(case.asked for case in documents))
    before = loaded(offloading)
    again = offloading.one_by_one(case.asked for case in documents)
    check(documents, again)
    assert loaded(offloading) > before
    assert sum(answer.cached_tokens for answer in again) > 0.7 * sum(len(case.prompt) for case in documents)


def test_many_at_once(documents: list[Case], offloading: Completions):
    """Aborts, evictions and preemptions while blocks are stored and loaded."""
    load(documents, offloading)


@pytest.mark.soak
def test_host_memory_that_is_full(documents: list[Case], servers: Callable[..., Server], demo_model: Path):
    """Of 200 blocks, fewer than two prompts take."""
    sizes = ModelSizes.from_config(json.loads((demo_model / "config.json").read_text()))
    plan = layout.cache_layout(
        sizes, activation_dtype="float32", kv_bytes=0, block_tokens=16, prefix_caching=True, device="cpu"
    )
    load(documents, Completions(servers(demo_model, *FLAGS, *SMALL, connector(200 * plan.block_bytes), env=ENV)))


@pytest.mark.soak
def test_a_restart_loses_nothing(
    documents: list[Case], servers: Callable[..., Server], demo_model: Path, tmp_path: Path
):
    """What is in files is found by the next server, a file that is cut short is not used, nor are others' at all."""
    root = tmp_path / "prefixes"
    files = connector(1 << 28, "HostTieringSpec", secondary_tiers=[{"type": "fs", "root_dir": str(root)}])
    prompts = sum(len(case.prompt) for case in documents)

    def ask(run: int, *more: str) -> tuple[Server, float]:
        """Every run has a server of its own."""
        server = servers(demo_model, *FLAGS, *SMALL, files, *more, env=ENV | {"RUN": str(run)})
        client = Completions(server)
        check(documents, client.one_by_one(case.asked for case in documents))
        wait_for_files(root)
        found = loaded(client, "disk")
        server.stop()
        return server, found

    ask(0)
    assert ask(1)[1] > 0.7 * prompts
    for path in list(root.rglob("*.bin"))[::100]:  # of some documents
        os.truncate(path, path.stat().st_size // 2)
    assert ask(2)[1] > 0
    server, found = ask(3, "--seed=1")
    assert found == 0 and "folders besides" in server.log


def wait_for_files(root: Path) -> None:
    """Until no more are written."""
    before = -1
    while (now := sum(1 for _ in root.rglob("*.bin"))) != before:
        before = now
        time.sleep(3)


def load(documents: list[Case], offloading: Completions) -> None:
    assert asyncio.run(mixed(offloading, documents, requests=60, seed=52, at_once=12)) == []
    for seed in range(2):
        order = random.Random(seed).sample(documents, len(documents))
        check(order, offloading.at_once(case.asked for case in order))
