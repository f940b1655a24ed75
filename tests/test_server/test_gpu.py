"""On a GPU, in bfloat16: every way to serve a prompt is as near to the fp32 reference as transformers in bf16 is.

vLLM's latent attention takes no fp32 there, so answers are not equal token by token. Each server's own greedy answers
are scored by the reference instead, token after token: where the best token leads by more than bf16 can overturn, the
server must have taken it, and over all it may not take others much more often than transformers in bf16 would.
`test_bfloat16.py`, which runs here too, bounds the mean divergence.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.completions import Answer, Completions
from tests.prompts import LENGTHS, Stream
from vllm_kimi_linear.launch import Server
from vllm_kimi_linear.oracle import Oracle, Score

pytestmark = pytest.mark.gpu

FLAGS = ("--dtype=bfloat16", "--max-model-len=4096", "--gpu-memory-utilization=0.3")
NGRAM = '--speculative-config={"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3}'
WAYS = {
    "graphs": ("--enable-prefix-caching",),
    "eager, short of blocks": (
        "--enforce-eager",
        "--max-num-batched-tokens=64",
        "--max-num-seqs=32",
        "--num-gpu-blocks-override=25",  # one sequence of the full length needs 23
        "--no-enable-prefix-caching",
    ),
    "drafts": (NGRAM, "--no-enable-prefix-caching"),
    "state in bfloat16": ("--mamba-ssm-cache-dtype=bfloat16", "--no-enable-prefix-caching"),
}
TOKENS = 64
GROWING = (180,) * 24  # one block of 192 tokens each, until their answers need another: more than a short cache has
RATIO = 1.2


@pytest.fixture(scope="module")
def asked(vocab: int) -> list[tuple[list[int], int]]:
    """Prompts of every length, the later half of each a repetition, so that drafts find something to propose."""
    stream = Stream(vocab, seed=5)
    prompts = []
    for length in (*LENGTHS, *GROWING):
        half = stream.prompt(-(-length // 2))
        prompts.append(((half + half)[:length], TOKENS))
    return prompts


@pytest.fixture(scope="module")
def bfloat16_oracle(oracle: Oracle) -> Oracle:
    return Oracle(oracle.path, torch.bfloat16)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *FLAGS, *WAYS[request.param]))


def check(oracle: Oracle, rough: Oracle, asked: list[tuple[list[int], int]], answers: list[Answer]) -> str:
    """No clear choice of the reference missed, and others hardly more often than in bf16 there; says what was seen."""
    scores = [oracle.score(prompt, answer.tokens) for (prompt, _), answer in zip(asked, answers, strict=True)]
    tokens, others, rough_others = 0, 0, 0
    missed = []  # (length of the prompt, place in the answer, lead of the reference's choice)
    for (prompt, _), score in zip(asked, scores, strict=True):
        rough_choice = rough.score(prompt, score.answer).argmax
        choices = enumerate(zip(score.margins, score.argmax, score.answer, strict=True))
        missed += [(len(prompt), at, m) for at, (m, best, taken) in choices if m > Score.clear_lead and best != taken]
        tokens += len(score.answer)
        others += sum(a != b for a, b in zip(score.argmax, score.answer, strict=True))
        rough_others += sum(a != b for a, b in zip(score.argmax, rough_choice, strict=True))
    seen = f"{others} of {tokens} tokens are not the reference's, in transformers bf16 {rough_others}"
    assert not missed, f"{seen}; clear ones: {missed}"
    assert others <= RATIO * rough_others, seen
    return seen


def differing(ours: list[Answer], others: list[Answer]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(ours, others, strict=True))


def test_every_way(
    way: Completions,
    asked: list[tuple[list[int], int]],
    oracle: Oracle,
    bfloat16_oracle: Oracle,
    record_property: Callable[[str, object], None],
):
    alone = way.one_by_one(asked)
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = way.at_once(asked[i] for i in order)
    together = [shuffled[order.index(i)] for i in range(len(asked))]
    seen = {
        "alone": check(oracle, bfloat16_oracle, asked, alone),
        "together": check(oracle, bfloat16_oracle, asked, together),
        "answers that differ, alone and together": f"{differing(alone, together)} of {len(asked)}",
    }
    for name, value in seen.items():
        record_property(name, value)
        print(f"{name}: {value}")
    if "--speculative-config" in str(way.server.flags):
        assert way.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    if "--num-gpu-blocks-override=25" in way.server.flags:
        assert way.metric("vllm:num_preemptions_total") > 0


def test_warm_answers(
    servers: Callable[..., Server],
    demo_model: Path,
    asked: list[tuple[list[int], int]],
    oracle: Oracle,
    bfloat16_oracle: Oracle,
):
    """Prompts read once before are served from the prefix cache."""
    server = Completions(servers(demo_model, *FLAGS, *WAYS["graphs"]))
    stream = Stream(oracle.model.config.vocab_size, seed=6)
    document = stream.prompt(2000)
    questions = [(document + stream.prompt(length), TOKENS) for length in (1, 64, 100, 500)]
    cold = server.one_by_one(questions[:1]) + server.at_once(questions[1:], cold=True)
    warm = server.at_once(questions)
    assert sum(answer.cached_tokens for answer in warm) > 0
    print("cold:", check(oracle, bfloat16_oracle, questions, cold))
    print("warm:", check(oracle, bfloat16_oracle, questions, warm), f"; {differing(cold, warm)} differ from cold")
