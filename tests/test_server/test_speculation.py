"""With drafted tokens (--speculative-config, n-gram) every answer is still the reference's own.

The prompts repeat themselves, so that drafts are proposed, some accepted whole, some in part, some not at all.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.completions import Completions
from tests.conftest import FLAGS
from tests.prompts import Case, Stream, check, draw_cases
from vllm_kimi_linear.launch import Server
from vllm_kimi_linear.oracle import Oracle

DRAFTS = 3
NGRAM = f'--speculative-config={{"method":"ngram","num_speculative_tokens":{DRAFTS},"prompt_lookup_max":2}}'
BLOCK = 16
SIZES = ((1, 120), (2, 120), (9, 120), (64, 120), (130, 120), (300, 80), (1030, 80))  # prompt, answer


@pytest.fixture
def drafting(servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *FLAGS, NGRAM))


@pytest.fixture
def caching(servers: Callable[..., Server], demo_model: Path) -> Completions:
    """With a prefix cache too, in blocks of which an answer fills several."""
    flags = [flag for flag in FLAGS if flag != "--no-enable-prefix-caching"]
    more = ("--enable-prefix-caching", "--enable-prompt-tokens-details", f"--block-size={BLOCK}")
    return Completions(servers(demo_model, *flags, *more, NGRAM))


@pytest.fixture(scope="module")
def repetitive(
    oracle: Oracle, vocab: int, servers: Callable[..., Server], demo_model: Path
) -> list[Case]:
    """Prompts that say the same few words again and again."""
    stream = Stream(vocab, seed=11)

    def draw(length: int) -> list[int]:
        words = [stream.prompt(length) for length in (2, 3, 5)]
        prompt: list[int] = []
        while len(prompt) < length:
            prompt += stream.random.choice(words)
        return prompt[:length]

    guess = Completions(servers(demo_model, *FLAGS)).at_once
    return draw_cases(oracle, [(partial(draw, length), tokens) for length, tokens in SIZES], guess)


def test_answers_with_drafts(repetitive: list[Case], drafting: Completions):
    asked = [case.asked for case in repetitive]
    check(repetitive, drafting.one_by_one(asked))
    check(repetitive, drafting.at_once(asked))
    drafted, accepted = (
        drafting.metric(f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")
    )
    assert 0 < accepted < drafted


def test_answers_with_drafts_and_a_prefix_cache(repetitive: list[Case], caching: Completions):
    """What an answer left in the cache is found by the next prompt, which goes on where it ended."""
    asked = [case.asked for case in repetitive]
    check(repetitive, caching.one_by_one(asked))
    check(repetitive, caching.at_once(asked))
    for length in (BLOCK, 3 * BLOCK + 1, 60, 75):
        prompts = [(case.prompt + case.score.answer[:length], len(case.score.answer) - length) for case in repetitive]
        for prompt, case, answer in zip(prompts, repetitive, caching.at_once(prompts), strict=True):
            assert answer.tokens == case.score.answer[length:], f"{len(case.prompt)} + {length}"
            if len(prompt[0]) > 2 * BLOCK:
                assert answer.cached_tokens >= len(prompt[0]) - max(2 * BLOCK, len(prompt[0]) / 10)
    assert caching.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
