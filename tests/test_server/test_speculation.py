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
SIZES = ((1, 120), (2, 120), (9, 120), (64, 120), (130, 120), (300, 80), (1030, 80))  # prompt, answer


@pytest.fixture
def drafting(servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *FLAGS, NGRAM))


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
