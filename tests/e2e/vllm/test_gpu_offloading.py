"""On a GPU: a prefix that has left the cache comes back from the host's memory or from files, and is the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_demo.server import Server, free_port
from tests.e2e.vllm.test_gpu import FLAGS
from tests.support.completions import Answer, Completions
from tests.support.judge import TOKENS, Judge, Seen
from tests.support.prefill_decode import PrefillDecode
from tests.support.prompts import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HOST = "--kv-offloading-size=4"
SMALL = ("--enable-prefix-caching", "--num-gpu-blocks-override=40", "--max-num-seqs=16")  # some 3,000 tokens
WAYS = {
    "one rank": (HOST,),
    "two ranks": (HOST, "--tensor-parallel-size=2"),
    "state in bfloat16": (HOST, "--mamba-ssm-cache-dtype=bfloat16"),
    "vLLM's layers": (HOST, '--additional-config={"decode_kernels": false}'),
}
LENGTHS = (1900, 1500, 1000, 2500, 700, 1800)


def behind(**tier: Any) -> str:
    """The host's memory with a further tier behind it."""
    settings = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 1 << 32, "secondary_tiers": [tier]}
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    return f"--kv-transfer-config={json.dumps(connector)}"


class Rounds:
    """The same prompts asked several times: one round's answers are too few tokens to judge by."""

    def __init__(self, judge: Judge, asked: list[tuple[list[int], int]]) -> None:
        self.judge, self.asked, self.seen = judge, asked, Seen()

    def add(self, name: str, answers: list[Answer]) -> None:
        found = self.judge.compare(self.asked, answers)
        print(f"{name}: {found}")
        self.seen += found


def loaded(server: Completions) -> float:
    return server.metric("vllm:external_prefix_cache_hits_total")


@pytest.fixture(scope="module")
def asked(vocab: int) -> list[tuple[list[int], int]]:
    stream = Stream(vocab, seed=61)
    return [(stream.prompt(length), TOKENS) for length in LENGTHS]


@pytest.fixture(scope="module")
def judge(demo_model: Path) -> Judge:
    return Judge(demo_model)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_evicted_comes_back(
    way: str, servers: Callable[..., Server], demo_model: Path, asked: list[tuple[list[int], int]], judge: Judge
) -> None:
    if way == "two ranks" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    server, rounds = Completions(servers(demo_model, *FLAGS, *SMALL, *WAYS[way])), Rounds(judge, asked)
    rounds.add("cold", server.one_by_one(asked))
    before = loaded(server)
    rounds.add("loaded", server.one_by_one(asked))
    assert loaded(server) - before > 0.7 * sum(LENGTHS)
    for _ in range(3):
        rounds.add("at once", server.at_once(asked))
    rounds.seen.check()


def test_a_restart_loses_nothing(
    servers: Callable[..., Server], demo_model: Path, asked: list[tuple[list[int], int]], judge: Judge, tmp_path: Path
) -> None:
    flags = (*FLAGS, *SMALL, behind(type="fs", root_dir=str(tmp_path / "prefixes")))
    first, rounds = servers(demo_model, *flags), Rounds(judge, asked)
    rounds.add("cold", Completions(first).one_by_one(asked))
    first.stop()
    second = Completions(first.start())
    rounds.add("from files", second.one_by_one(asked))
    rounds.seen.check()
    assert loaded(second) > 0.7 * sum(LENGTHS)


@pytest.mark.nixl
@pytest.mark.parametrize("ranks", [1, 2])
def test_prompts_read_by_another_server(
    ranks: int, servers: Callable[..., Server], demo_model: Path, asked: list[tuple[list[int], int]], judge: Judge
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    ports = [free_port() for _ in range(2)]
    prefill, decode = (
        servers(
            demo_model,
            *(*FLAGS, *SMALL, f"--tensor-parallel-size={ranks}"),
            behind(type="p2p", host="127.0.0.1", port=port),
        )
        for port in ports
    )
    both, rounds = PrefillDecode(prefill, decode, ports[0]), Rounds(judge, asked)
    rounds.add("handed over", both.one_by_one(asked))
    assert loaded(both) > 0.7 * sum(LENGTHS)
    for _ in range(3):
        rounds.add("at once", both.at_once(asked, cold=True))
    rounds.seen.check()
