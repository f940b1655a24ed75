"""On a GPU, in bfloat16: every way to serve a prompt is as near to the fp32 reference as transformers in bf16 is.

vLLM's latent attention takes no fp32 there, so answers are not equal token by token. Each server's own greedy answers
are scored by the reference instead, token after token: where the best token leads by more than bf16 can overturn, the
server must have taken it, and over all it may not take others much more often than transformers in bf16 would.
`test_bfloat16.py`, which runs here too, bounds the mean divergence.
"""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kimi_demo.server import Server
from tests.support import patience
from tests.support.completions import Answer, Completions
from tests.support.judge import TOKENS, Judge, draw
from tests.support.prompts import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# A fixed cache, so that several servers may share a card; of the memory, so much must be free.
FLAGS = (
    "--dtype=bfloat16",
    "--max-model-len=4096",
    "--enable-prompt-tokens-details",
    "--kv-cache-memory-bytes=1G",
    "--gpu-memory-utilization=0.1",
)
NGRAM = '--speculative-config={"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3}'
CHUNKS = ("--max-num-batched-tokens=768",)  # four blocks, more than there are drafts
SHARED = "--decode-context-parallel-size="
WAYS = {
    "graphs": ("--enable-prefix-caching",),
    "vLLM's layers": ("--enable-prefix-caching", '--additional-config={"decode_kernels": false}'),
    "every step prepared": ("--enable-prefix-caching", '--additional-config={"steady_steps": false}'),
    "eager, short of blocks": (
        "--enforce-eager",
        "--max-num-batched-tokens=64",
        "--max-num-seqs=32",
        "--num-gpu-blocks-override=25",  # one sequence of the full length needs 23
        "--no-enable-prefix-caching",
    ),
    "graphs, short of blocks": (
        "--max-num-seqs=25",  # graphs need a block for each sequence
        "--num-gpu-blocks-override=25",
        "--no-enable-prefix-caching",
    ),
    "drafts": (NGRAM, "--no-enable-prefix-caching"),
    "drafts, prefixes kept": (NGRAM, "--enable-prefix-caching"),
    "drafts, prefixes kept, chunks of few blocks": (
        NGRAM,
        "--enable-prefix-caching",
        *CHUNKS,
    ),
    "state in bfloat16": ("--mamba-ssm-cache-dtype=bfloat16", "--no-enable-prefix-caching"),
    "two ranks": ("--tensor-parallel-size=2", "--enable-prefix-caching"),
    "four ranks": ("--tensor-parallel-size=4", "--enable-prefix-caching"),
    "two ranks, drafts, chunks of few blocks": (
        "--tensor-parallel-size=2",
        NGRAM,
        "--enable-prefix-caching",
        *CHUNKS,
    ),
    "two ranks, shared latents": ("--tensor-parallel-size=2", SHARED + "2", "--no-enable-prefix-caching"),
    "four ranks, shared latents": ("--tensor-parallel-size=4", SHARED + "4", "--no-enable-prefix-caching"),
    "two ranks, shared latents, prefixes kept": (
        "--tensor-parallel-size=2",
        SHARED + "2",
        "--enable-prefix-caching",
        '--additional-config={"shared_prefixes": true}',
    ),
    "two ranks, shared latents, short of blocks": (
        "--tensor-parallel-size=2",
        SHARED + "2",
        "--block-size=96",  # on both ranks 192 tokens, as on one: as few blocks are short
        "--max-num-batched-tokens=64",
        "--max-num-seqs=25",
        "--num-gpu-blocks-override=25",
        "--no-enable-prefix-caching",
    ),
    "two ranks, shared latents, prefixes kept, short of blocks": (
        "--tensor-parallel-size=2",
        SHARED + "2",
        "--block-size=96",
        "--max-num-batched-tokens=64",
        "--max-num-seqs=25",
        "--num-gpu-blocks-override=25",
        "--enable-prefix-caching",
        '--additional-config={"shared_prefixes": true}',
    ),
    "two ranks, fused all-reduce": (
        "--tensor-parallel-size=2",
        "--enable-prefix-caching",
        '--additional-config={"fused_all_reduce": true}',
    ),
    "two stages": ("--pipeline-parallel-size=2", "--enable-prefix-caching"),
    "two engines": ("--data-parallel-size=2", "--enable-prefix-caching"),
    "two ranks, experts apart": ("--tensor-parallel-size=2", "--enable-expert-parallel", "--enable-prefix-caching"),
    "latents by Triton": ("--attention-backend=TRITON_MLA", "--enable-prefix-caching"),
    "worker apart, steps in turn": (
        "--distributed-executor-backend=mp",
        "--no-async-scheduling",
        "--enable-prefix-caching",
    ),
    **{
        f"graphs {mode}": (f'--compilation-config={{"cudagraph_mode":"{mode}"}}', "--enable-prefix-caching")
        for mode in ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY")
    },
}


@pytest.fixture(scope="module")
def asked(vocab: int) -> list[tuple[list[int], int]]:
    return draw(vocab)


@pytest.fixture(scope="module")
def judge(demo_model: Path) -> Judge:
    return Judge(demo_model)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    flags = WAYS[request.param]
    sizes = [flag.partition("=")[2] for flag in flags if flag.startswith("--tensor-parallel-size=")]
    ranks = int(sizes[0]) if sizes else 1
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return Completions(servers(demo_model, *FLAGS, *flags), logprobs=False)


def differing(ours: list[Answer], others: list[Answer]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(ours, others, strict=True))


def test_every_way(
    way: Completions,
    asked: list[tuple[list[int], int]],
    judge: Judge,
    record_property: Callable[[str, object], None],
):
    alone = way.one_by_one(asked)
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = way.at_once(asked[i] for i in order)
    together = [shuffled[order.index(i)] for i in range(len(asked))]
    seen = {
        "alone": judge.check(asked, alone),
        "together": judge.check(asked, together),
        "answers that differ, alone and together": f"{differing(alone, together)} of {len(asked)}",
    }
    for name, value in seen.items():
        record_property(name, value)
        print(f"{name}: {value}")
    if "--speculative-config" in str(way.server.flags):
        assert way.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    if "--enable-prefix-caching" in way.server.flags:
        assert sum(answer.cached_tokens for answer in together) > 0
    if "--num-gpu-blocks-override=25" in way.server.flags:
        assert way.metric("vllm:num_preemptions_total") > 0


def call(server: Server, path: str, **body: object) -> Any:
    reply = httpx.post(f"{server.url}/{path}", json=body or None, timeout=patience.SECONDS, trust_env=False)
    assert reply.status_code == 200, (path, reply.text)
    return reply.json() if reply.content else None


def test_steady_steps_change_no_token(servers: Callable[..., Server], demo_model: Path, vocab: int):
    """One sequence at a time, so that both run the same kernels; long enough for several blocks."""
    stream = Stream(vocab, seed=8)
    asked = [(stream.prompt(length), 500) for length in (1, 64, 191, 500, 1500)]
    flags = (*FLAGS, "--no-enable-prefix-caching", "--worker-extension-cls=tests.support.counted_steps.CountedSteps")
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answers, steps = [], []
    for config in ('{"steady_steps": false}', '{"steady_steps": true}'):
        server = servers(demo_model, *flags, f"--additional-config={config}", env=env)
        call(server, "collective_rpc", method="count_steps")
        answers.append([answer.tokens for answer in Completions(server, logprobs=False).one_by_one(asked)])
        steps.append(call(server, "collective_rpc", method="counted_steps")["results"][0])
    assert answers[0] == answers[1]
    assert int(steps[0]) == 0 and int(steps[1]) > 0.9 * 500 * len(asked), steps


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_and_awake(level: int, servers: Callable[..., Server], demo_model: Path, asked: list):
    """Weights go to the host or are read again, all states and latents are lost: the answers are those of before."""
    flags = (*FLAGS, "--enable-prefix-caching", "--enable-sleep-mode")
    server = servers(demo_model, *flags, env={"VLLM_SERVER_DEV_MODE": "1"})
    client = Completions(server, logprobs=False)
    before = client.one_by_one(asked)
    for _ in range(2):
        call(server, f"sleep?level={level}")
        if level == 2:
            call(server, "wake_up?tags=weights")
            call(server, "collective_rpc", method="reload_weights")
            call(server, "wake_up?tags=kv_cache")
        else:
            call(server, "wake_up")
        after = client.one_by_one(asked)
        assert differing(before, after) == 0
        assert sum(answer.cached_tokens for answer in after) == 0


@pytest.mark.parametrize("way", ["graphs", "two ranks, shared latents, prefixes kept"])
def test_warm_answers(way: str, servers: Callable[..., Server], demo_model: Path, vocab: int, judge: Judge):
    """Prompts read once before are served from the prefix cache."""
    if "two ranks" in way and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    server = Completions(servers(demo_model, *FLAGS, *WAYS[way]))
    stream = Stream(vocab, seed=6)
    document = stream.prompt(2000)
    questions = [(document + stream.prompt(length), TOKENS) for length in (1, 64, 100, 500)]
    cold = server.one_by_one(questions[:1]) + server.at_once(questions[1:], cold=True)
    warm = server.at_once(questions)
    assert sum(answer.cached_tokens for answer in warm) > 0
    print("cold:", judge.check(questions, cold))
    print("warm:", judge.check(questions, warm), f"; {differing(cold, warm)} differ from cold")
