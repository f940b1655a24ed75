"""With drafted tokens (--speculative-config, n-gram) every answer is still the reference's own, or drawn as without.

The prompts repeat themselves, so that drafts are proposed, some accepted whole, some in part, some not at all.
"""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support.completions import Answer, Completions
from tests.support.prompts import Case, Stream, check, draw_cases

DRAFTS = 3
NGRAM = f'--speculative-config={{"method":"ngram","num_speculative_tokens":{DRAFTS},"prompt_lookup_max":2}}'
BLOCK = 16
SIZES = ((1, 120), (2, 120), (9, 120), (64, 120), (130, 120), (300, 80), (1030, 80))  # prompt, answer
TOP_K = 2  # of generation_config.json

# Few words and every pair of them in the prompt: whatever is drawn, a draft follows.
WORDS = (11, 12, 13)
PAIRS = (11, 11, 12, 11, 13, 12, 12, 13, 13, 11)
LENGTH = 3  # tokens of an answer: 27 answers
AT_ONCE = 50  # `n` of a request


@pytest.fixture(scope="module")
def with_top_k(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a `top_k` for every request that names none."""
    path = tmp_path_factory.mktemp("top-k") / "model"
    shutil.copytree(demo_model, path)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": TOP_K}))
    return path


@pytest.fixture
def drafting(servers: Callable[..., Server], with_top_k: Path) -> Completions:
    return Completions(servers(with_top_k, *FLAGS, NGRAM))


@pytest.fixture
def plain(servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *FLAGS))


@pytest.fixture
def caching(servers: Callable[..., Server], demo_model: Path) -> Completions:
    """With a prefix cache too, in blocks of which an answer fills several."""
    flags = [flag for flag in FLAGS if flag != "--no-enable-prefix-caching"]
    more = ("--enable-prefix-caching", "--enable-prompt-tokens-details", f"--block-size={BLOCK}")
    return Completions(servers(demo_model, *flags, *more, NGRAM))


@pytest.fixture(scope="module")
def repetitive(reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path) -> list[Case]:
    """Prompts that say the same few words again and again."""
    stream = Stream(vocab, seed=11)

    def draw(length: int) -> list[int]:
        words = [stream.prompt(length) for length in (2, 3, 5)]
        prompt: list[int] = []
        while len(prompt) < length:
            prompt += stream.random.choice(words)
        return prompt[:length]

    guess = Completions(servers(demo_model, *FLAGS)).at_once
    return draw_cases(reference, [(partial(draw, length), tokens) for length, tokens in SIZES], guess)


def test_answers_with_drafts(repetitive: list[Case], drafting: Completions):
    asked = [case.asked for case in repetitive]
    check(repetitive, drafting.one_by_one(asked))
    check(repetitive, drafting.at_once(asked))
    drafted, accepted = (drafting.metric(f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


Drawn = list[tuple[int, ...]]


def draw(
    server: Completions, asked: list[tuple[dict[str, Any], int]], beside: Iterable[tuple[list[int], int]] = ()
) -> tuple[list[Drawn], list[Answer]]:
    """That many answers to PAIRS for each of the parameters, and greedy ones to `beside`, all asked at once.

    Every sample has a seed of its own.
    """

    async def run() -> tuple[list[Drawn], list[Answer]]:
        async with server.connect() as client:

            async def some(more: dict[str, Any], seed: int) -> Drawn:
                body = server.body(PAIRS, LENGTH, allowed_token_ids=WORDS, n=AT_ONCE, seed=seed, logprobs=None, **more)
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                return [tuple(choice["token_ids"]) for choice in reply.json()["choices"]]

            async def all_of(more: dict[str, Any], count: int) -> Drawn:
                batches = await asyncio.gather(*(some(more, seed) for seed in range(0, count, AT_ONCE)))
                return [answer for batch in batches for answer in batch]

            greedy = asyncio.gather(*(server.ask(client, *one) for one in beside))
            return await asyncio.gather(*(all_of(*one) for one in asked)), await greedy

    return asyncio.run(run())


def likelihood(one: Drawn, other: Drawn) -> float:
    """Of two samples as different as these, if both were drawn from one distribution: the chi-square test of that."""
    counts = [Counter(one), Counter(other)]
    seen = torch.tensor([[count[answer] for count in counts] for answer in {*one, *other}], dtype=torch.float64)
    rare = seen.sum(1) < 10  # too few for the test: counted as one
    seen = torch.cat((seen[~rare], seen[rare].sum(0, keepdim=True))) if rare.any() else seen
    expected = seen.sum(1, keepdim=True) * seen.sum(0) / seen.sum()
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return 1.0 if len(seen) == 1 else float(torch.special.gammaincc(freedom, statistic / 2))


def test_samples_with_drafts_are_drawn_as_without(repetitive: list[Case], drafting: Completions, plain: Completions):
    """All kinds of requests in one batch; the seeds are fixed, so that what is drawn is, too."""
    before = drafting.metric("vllm:spec_decode_num_accepted_tokens_total")
    asked = [(with_drafts, count) for with_drafts, _, count in SAMPLED]
    drafted, greedy = draw(drafting, asked, beside=[case.asked for case in repetitive])
    assert drafting.metric("vllm:spec_decode_num_accepted_tokens_total") > before + 500
    check(repetitive, greedy)
    expected, _ = draw(plain, [(without, count) for _, without, count in SAMPLED])
    for (more, _, count), ours, theirs in zip(SAMPLED, drafted, expected, strict=True):
        assert len(ours) == len(theirs) == count
        assert likelihood(ours, theirs) > 1e-3, f"{more}: {Counter(ours)} with drafts, {Counter(theirs)} without"
    assert len(set(drafted[0])) == len(WORDS) ** LENGTH
    assert len(set(drafted[3])) == 1


def test_a_step_without_drafts_may_have_a_top_k(drafting: Completions):
    """The first step of a request alone drafts nothing."""
    for more in ({"top_k": 5}, {"temperature": None}, {"temperature": None, "top_p": 0.5}, {"temperature": 0}):
        assert len(drafting.post(drafting.body([5], 8, **({"temperature": 1} | more)))["choices"][0]["token_ids"]) == 8


@pytest.mark.parametrize("length", [10, 2300])
def test_a_seed_gives_one_answer(drafting: Completions, plain: Completions, length: int):
    """Whether the prompt is read in one step or in several, alone or beside others."""
    prompt = (list(PAIRS) * length)[:length]
    for server in (drafting, plain):

        def ask(seed: int, beside: int = 0, server: Completions = server) -> list[int]:
            async def run() -> list[int]:
                async with server.connect() as client:
                    others = [server.ask(client, prompt[:400], 4) for _ in range(beside)]
                    answer = server.ask(client, prompt, 40, temperature=1, top_k=-1, seed=seed)
                    return (await asyncio.gather(*others, answer))[-1].tokens

            return asyncio.run(run())

        alone = ask(1)
        assert ask(1) == ask(1, beside=5) == alone
        assert ask(2) != alone


@pytest.mark.parametrize("which", ["drafting", "caching"])
def test_prompts_of_one_token_beside_others(repetitive: list[Case], request: pytest.FixtureRequest, which: str):
    """They start from no state, whatever the blocks that they are given hold; more come as soon as one has ended."""
    server: Completions = request.getfixturevalue(which)
    short = [case for case in repetitive if len(case.prompt) == 1] * 8
    check(short, server.at_once([case.asked for case in short], cold=which == "caching"))
    others = [*repetitive, *short]
    check(others, server.at_once([case.asked for case in others]))


# How a request asks for its samples, what the server without drafts is asked for the same, and how many are drawn.
SAMPLED: tuple[tuple[dict[str, Any], dict[str, Any], int], ...] = (
    ({"temperature": 1, "top_k": -1}, {"temperature": 1}, 1000),
    ({"temperature": None}, {"temperature": 1, "top_k": TOP_K}, 300),  # left out, and generation_config.json's top_k
    ({"temperature": 0.6, "top_k": -1, "top_p": 0.8}, {"temperature": 0.6, "top_p": 0.8}, 300),
    ({"temperature": 1.5, "top_k": 1}, {"temperature": 1.5, "top_k": 1}, 50),
)


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
