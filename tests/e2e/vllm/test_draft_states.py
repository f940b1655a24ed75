"""Drafts, a prefix cache and prompts in several chunks together: each answer is that of its own cold run.

A prompt's chunks pass more blocks than there are drafts, so that a request's running state moves into a block that held
a draft. Which states are kept meanwhile, preemption included, is tested without a model in
`tests/e2e/plugin/test_scheduled_states.py`, and with one by `make soak`.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kimi_demo.server import Server
from tests.support.cold_runs import ColdRun, cold_run
from tests.support.completions import Completions

TOKENS = 24
FEW_BLOCKS = 420  # of 112 tokens: a prompt of 9,000 tokens takes 81 for its latents, and 2 to 6 for each group's states


def flags(drafts: int, budget: int, *more: str) -> tuple[str, ...]:
    return (
        "--dtype=float32",
        "--max-model-len=10240",
        "--kv-cache-memory-bytes=1G",
        f"--max-num-batched-tokens={budget}",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        # One token is enough for a draft: those of random weights are seldom found in pairs.
        f'--speculative-config={{"method":"ngram","num_speculative_tokens":{drafts},"prompt_lookup_max":2,'
        '"prompt_lookup_min":1}',
        *more,
    )


class Words:
    """Prompts that repeat themselves here and there, so that some drafts are right."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab, self.random = vocab, random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        draw = self.random
        words = [[draw.randrange(self.vocab) for _ in range(n)] for n in (2, 3, 5)]
        found: list[int] = []
        while len(found) < length:
            found += draw.choice(words) if draw.random() < 0.7 else [draw.randrange(self.vocab)]
        return found[:length]


async def ask(server: Completions, client: httpx.AsyncClient, case: ColdRun, **more: Any) -> list[str]:
    """The faults of an answer to a case."""
    reply = await client.post("/v1/completions", json=server.body(case.prompt, TOKENS, **more))
    assert reply.status_code == 200, reply.text
    choices = reply.json()["choices"]
    if "n" in more:  # sampled, or vLLM gives one answer only
        return [f"n={more['n']}: {len(choices)} answers"] if len(choices) != more["n"] else []
    faults = [fault for choice in choices if (fault := case.differs(choice["token_ids"]))]
    if "prompt_logprobs" in more and len(choices[0]["prompt_logprobs"]) != len(case.prompt):
        faults.append(f"{len(case.prompt)} tokens: {len(choices[0]['prompt_logprobs'])} prompt_logprobs")
    return faults


async def leave(server: Completions, client: httpx.AsyncClient, prompt: list[int]) -> None:
    """Leave at the first token."""
    async for _ in server.stream(client, prompt, TOKENS):
        return


async def everything(server: Completions, words: Words, lengths: list[int]) -> list[str]:
    """Faults of prompts of these lengths: alone, at once, repeated, continued, three answers each, beside aborts."""
    async with server.connect() as client:
        cases = [await cold_run(server, client, words.prompt(length), TOKENS) for length in lengths]
        faults = [await ask(server, client, case) for case in cases]
        others = []
        for case in cases:  # parts from it somewhere, or goes on from it
            shared = words.random.randrange(len(case.prompt))
            own = words.prompt(words.random.randrange(1, 300))
            others.append(await cold_run(server, client, (case.prompt[:shared] + own)[: len(case.prompt)], TOKENS))
            others.append(await cold_run(server, client, case.prompt + case.tokens + own[:50], TOKENS))
        mixed = [ask(server, client, case) for case in (*others, *cases)]
        mixed += [ask(server, client, case, n=3, temperature=1.0) for case in cases[:2]]
        mixed += [ask(server, client, case, prompt_logprobs=1) for case in cases[:2]]
        gone = [leave(server, client, words.prompt(length)) for length in lengths]
        words.random.shuffle(mixed)
        found, _ = await asyncio.gather(asyncio.gather(*mixed), asyncio.gather(*gone))
        await server.until_idle()
    return [fault for each in (*faults, *found) for fault in each]


@pytest.mark.parametrize(
    ("drafts", "budget", "more"),
    [
        pytest.param(4, 512, ("--max-num-seqs=32", f"--num-gpu-blocks-override={FEW_BLOCKS}"), id="4 drafts, 512, few"),
        *(
            pytest.param(drafts, budget, (), id=f"{drafts} drafts, {budget}", marks=pytest.mark.soak)
            for drafts in (1, 2, 4)
            for budget in (512, 1024, 4096)
        ),
    ],
)
def test_answers_are_those_of_cold_runs(
    drafts: int, budget: int, more: tuple[str, ...], vocab: int, servers: Callable[..., Server], demo_model: Path
):
    server = Completions(servers(demo_model, *flags(drafts, budget, *more)))
    words = Words(vocab, seed=drafts + budget)
    lengths = [1000, 2300, 9000] if not more else [2016, 2300, 1500]
    assert asyncio.run(everything(server, words, lengths)) == []
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0


@pytest.mark.soak
def test_32_of_mixed_lengths_at_once(vocab: int, servers: Callable[..., Server], demo_model: Path):
    server = Completions(servers(demo_model, *flags(2, 1024)))
    words = Words(vocab, seed=3)
    lengths = [words.random.randrange(1000, 9000) for _ in range(32)]
    assert asyncio.run(everything(server, words, lengths)) == []
