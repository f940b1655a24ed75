"""Prefix caching is exact: what is found in the cache changes no token, whatever was asked before or beside.

Two servers. One has the default block size, which holds the states of all KDA layers, and chunks of several blocks.
The other has a block for each layer's state, as a large model has, chunks of a few blocks that end anywhere, and a
cache so small that it evicts and preempts. Every answer is compared with transformers'.
"""

import asyncio
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import TWO_WORKERS
from tests.support.completions import Completions
from tests.support.load import mixed
from tests.support.prompts import ROUTER_GAP, Case, Stream, check, draw_cases, draw_growing
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

BLOCK, SMALL_BLOCK = 112, 16  # the default for the demo checkpoint in fp32, and one that is narrower than a state
COMMON_FLAGS = (
    "--dtype=float32",
    "--max-model-len=4096",
    "--kv-cache-memory-bytes=1G",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
)
WIDE = (*COMMON_FLAGS, "--max-num-batched-tokens=1024")
NARROW = (
    *COMMON_FLAGS,
    "--max-num-batched-tokens=72",
    "--max-num-seqs=32",
    f"--block-size={SMALL_BLOCK}",
    "--num-gpu-blocks-override=300",
    '--additional-config={"check_states": true}',
)

PREFIXES = (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK, 1000)
SUFFIXES = (1, 2, BLOCK - 1)  # after the prefixes of one less than a block these end a prompt on a block's edge, too
CONVERSATIONS = 3
TURNS = (BLOCK, 1, 2 * BLOCK - 1, 60, BLOCK + 1)  # new tokens a turn
TOKENS = 24


@pytest.fixture(params=[WIDE, NARROW], ids=["wide", "narrow"])
def caching(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *request.param))


@pytest.fixture(scope="session")
def families(reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path) -> list[Case]:
    """Prompts of eight shared prefixes, three continuations each."""
    server = Completions(servers(demo_model, *WIDE))
    stream = Stream(vocab, seed=7)
    wanted: list[tuple[Callable[[], list[int]], int]] = []
    for length in PREFIXES:
        while reference.score(prefix := stream.prompt(length), [0]).router_gap <= ROUTER_GAP:
            pass
        wanted += [(partial(_continue, prefix, stream, suffix), TOKENS) for suffix in SUFFIXES]
    return draw_cases(reference, wanted, partial(server.at_once, cold=True))


@pytest.fixture(scope="session")
def conversations(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path
) -> list[list[Case]]:
    """Turn by turn, the prompts of conversations: all that was said before, and some new tokens."""
    server = Completions(servers(demo_model, *WIDE))
    stream = Stream(vocab, seed=8)
    said: list[list[int]] = [[] for _ in range(CONVERSATIONS)]
    turns = []
    for new in TURNS:
        wanted = [(partial(_continue, before, stream, new), TOKENS) for before in said]
        turn = draw_cases(reference, wanted, partial(server.at_once, cold=True))
        said = [case.prompt + case.score.answer for case in turn]
        turns.append(turn)
    return turns


def _continue(prefix: list[int], stream: Stream, new: int) -> list[int]:
    return prefix + stream.prompt(new)


def test_cold_then_hot(families: list[Case], caching: Completions):
    block = SMALL_BLOCK if f"--block-size={SMALL_BLOCK}" in caching.server.flags else BLOCK
    assert f'block_size="{block}"' in caching.metrics()
    cold = caching.at_once((case.asked for case in families), cold=True)
    check(families, cold)
    assert all(answer.cached_tokens == 0 for answer in cold)
    hits = 0
    for seed in range(4):
        order = random.Random(seed).sample(families, len(families))
        answers = caching.at_once(case.asked for case in order)
        check(order, answers)
        for case, answer in zip(order, answers, strict=True):
            assert answer.cached_tokens % block == 0 and answer.cached_tokens < len(case.prompt)
            hits += answer.cached_tokens > 0
    assert hits >= len(families) / 4


def test_growing_conversations(conversations: list[list[Case]], caching: Completions):
    hits = 0
    for turn in conversations:
        answers = caching.at_once(case.asked for case in turn)
        check(turn, answers)
        hits += sum(answer.cached_tokens > 0 for answer in answers)
    assert hits > 0


def test_random_load(families: list[Case], conversations: list[list[Case]], caching: Completions):
    """Cancellations, evictions and preemptions included."""
    before = caching.metric("vllm:prefix_cache_hits_total")
    cases = families + [case for turn in conversations for case in turn]
    assert asyncio.run(mixed(caching, cases, requests=80, seed=9, at_once=24)) == []
    assert caching.metric("vllm:prefix_cache_hits_total") > before


@pytest.mark.soak
def test_random_load_for_long(families: list[Case], conversations: list[list[Case]], caching: Completions):
    cases = families + [case for turn in conversations for case in turn]
    for seed in range(4):
        assert asyncio.run(mixed(caching, cases, requests=300, seed=seed, at_once=32)) == []


def test_how_much_of_a_document_is_reused(vocab: int, servers: Callable[..., Server], demo_model: Path):
    """The second request reuses all but a block or a tenth of what it shares, the third all but a block."""
    server = Completions(servers(demo_model, *WIDE))
    stream = Stream(vocab, seed=10)
    for shared in (BLOCK + 1, 500, 1300, 1999, 3000):
        document = stream.prompt(3300)
        questions = [document, *(document[:shared] + stream.prompt(40) for _ in range(3))]
        found = [server.one_by_one([(question, 2)])[0].cached_tokens for question in questions]
        assert found[0] == 0
        assert found[1] >= shared - max(BLOCK, shared / 10) - 1, f"second of {shared}: {found}"
        assert found[2] > shared - BLOCK - 1 and found[3] > shared - BLOCK - 1, f"third of {shared}: {found}"


def test_the_log_says_what_fits(servers: Callable[..., Server], demo_model: Path):
    """In sequences, as planned before the start, and not in a number of tokens."""
    model_sizes = ModelSizes.from_config(json.loads((demo_model / "config.json").read_text()))
    plan = layout.cache_layout(model_sizes, activation_dtype="float32", kv_bytes=1 << 30, prefix_caching=True)
    log = servers(demo_model, *WIDE).log
    assert f"Kimi Linear: {plan.describe(4096)}" in log
    assert f"{plan.sequences(4096)} sequences of 4,096 tokens" in log
    assert "KV cache size" not in log


def test_the_metrics_tell_snapshots(families: list[Case], servers: Callable[..., Server], demo_model: Path):
    """Held and evicted ones; what is evicted was held, and a small cache does evict."""
    wide, narrow = (Completions(servers(demo_model, *flags)) for flags in (WIDE, NARROW))
    fresh = families[0].prompt[: BLOCK + 1] + families[-1].prompt[: 3 * BLOCK]
    before = wide.metric("kimi_linear_snapshots_held")
    wide.one_by_one([(fresh, 1)])
    assert wide.metric("kimi_linear_snapshots_held") - before in (3, 4)  # after one block, or the first is known
    evicted = narrow.metric("kimi_linear_snapshots_evicted_total")
    for case in families[-3:]:
        narrow.at_once([case.asked], cold=True)
    assert narrow.metric("kimi_linear_snapshots_evicted_total") > evicted
    assert 0 < narrow.metric("kimi_linear_snapshots_held") * 6 < 300


def test_preempted_requests_are_computed_again(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path
):
    wide, narrow = (Completions(servers(demo_model, *flags)) for flags in (WIDE, NARROW))
    growing = draw_growing(reference, vocab, wide.at_once)  # 23 of the 24 fit at first, 18 at the end
    before = narrow.metric("vllm:num_preemptions_total")
    check(growing, narrow.at_once((case.asked for case in growing), cold=True))
    assert narrow.metric("vllm:num_preemptions_total") > before


def test_two_ranks(families: list[Case], servers: Callable[..., Server], demo_model: Path):
    """Cold, then hot, each rank with the states of its own heads."""
    flags = (*WIDE, "--tensor-parallel-size=2", f"--block-size={SMALL_BLOCK}")
    server = Completions(servers(demo_model, *flags, env=TWO_WORKERS))
    check(families, server.at_once(case.asked for case in families))
    order = random.Random(4).sample(families, len(families))
    answers = server.at_once(case.asked for case in order)
    check(order, answers)
    for case, answer in zip(order, answers, strict=True):
        # Asked before, as a whole: all is found but the last block and what a kept state is away.
        length = len(case.prompt)
        assert answer.cached_tokens >= length - 1 - max(SMALL_BLOCK, length / 10), f"{answer.cached_tokens} of {length}"
