"""Answers do not depend on what else the server does: batches, chunks, cancellations, preemption.

Two servers: the default one, whose token budget holds several prompts, and a narrow one that reads prompts 64
tokens at a time and has room in its cache for a few sequences only.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_demo.server import Server
from tests.support.completions import Answer, Completions
from tests.support.load import ENDLESS, cancelled, first, mixed
from tests.support.prompts import Case, check

CHUNK = 64
NARROW_FLAGS = (
    "--dtype=float32",
    "--max-model-len=2304",
    "--kv-cache-memory-bytes=1G",
    f"--max-num-batched-tokens={CHUNK}",
    "--max-num-seqs=32",
    "--num-gpu-blocks-override=32",  # one sequence of the full length needs 22
    "--no-enable-prefix-caching",
)


@pytest.fixture
def narrow(servers: Callable[..., Server], demo_model: Path) -> Completions:
    return Completions(servers(demo_model, *NARROW_FLAGS))


def check_all_at_once(cases: list[Case], server: Completions, seed: int) -> None:
    order = random.Random(seed).sample(cases, len(cases))
    check(order, server.at_once(case.asked for case in order))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_at_once_in_random_order(cases: list[Case], server: Completions, seed: int):
    check_all_at_once(cases, server, seed)


async def ask_beside_streams(
    server: Completions, streamed: list[Case], prompts: list[Case], tokens: int
) -> tuple[list[Answer], list[Answer], list[list[int]]]:
    """Ask for `prompts` one after another while `streamed` are being answered with so many tokens.

    Returns both answers and, for each prompt, how many tokens each stream got between the prompt's sending and
    its first token.
    """
    answers = [Answer([], [], 0) for _ in streamed]
    done = asyncio.Event()
    begun = asyncio.Barrier(len(streamed) + 1)

    async def follow(index: int) -> None:
        case = streamed[index]
        stream = server.stream(client, case.prompt, tokens)
        answers[index] = await anext(stream)
        await begun.wait()
        async for answer in stream:
            if done.is_set() and len(answer.tokens) >= len(case.score.answer):
                break
        await stream.aclose()

    asked, received = [], []
    async with server.connect() as client, asyncio.TaskGroup() as tasks:
        for index in range(len(streamed)):
            tasks.create_task(follow(index))
        await begun.wait()
        for prompt in prompts:
            before = [len(answer.tokens) for answer in answers]
            stream = server.stream(client, prompt.prompt, 1)
            asked.append(await anext(stream))
            received.append([len(answer.tokens) - old for answer, old in zip(answers, before, strict=True)])
            await stream.aclose()
        done.set()
    return [first(answer, case) for answer, case in zip(answers, streamed, strict=True)], asked, received


def check_prompts_beside_streams(
    cases: list[Case], server: Completions, lengths: list[int], tokens: int, least: int
) -> None:
    streamed = [case for case in cases if len(case.score.answer) == 300]
    prompts = [case for length in lengths for case in cases if len(case.prompt) == length]
    answers, asked, received = asyncio.run(ask_beside_streams(server, streamed, prompts, tokens))
    check(streamed, answers)
    check(prompts, asked)
    # A stream only goes on while a prompt is read if its rows are in the same batches. All prompts together, for
    # a token of a stream may be received after the prompt's own that was computed with it.
    assert min(map(sum, zip(*received, strict=True))) >= least * len(prompts), received


def test_prompts_are_read_while_others_stream(cases: list[Case], server: Completions):
    check_prompts_beside_streams(cases, server, [2000, 1, 1500, 64, 2, 1025, 511], ENDLESS, least=1)


def test_cancelled_requests_leave_the_others_alone(cases: list[Case], server: Completions):
    choose = random.Random(3)
    order = choose.sample(cases, len(cases))
    leaving = choose.sample([index for index, case in enumerate(order) if len(case.score.answer) > 40], 8)
    after = {index: i % 3 * 5 for i, index in enumerate(leaving)}
    finished = server.metric("vllm:request_success_total")

    async def run() -> list[Answer]:
        async with server.connect() as client:
            return await asyncio.gather(
                *(
                    cancelled(server, client, case, after[index], ENDLESS)
                    if index in after
                    else server.ask(client, *case.asked)
                    for index, case in enumerate(order)
                )
            )

    check(order, asyncio.run(run()))
    asyncio.run(server.until_idle())
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm:request_success_total") - finished == len(order) - len(leaving)


def test_random_load(cases: list[Case], server: Completions):
    assert asyncio.run(mixed(server, cases, requests=60, seed=4)) == []


@pytest.mark.soak
def test_random_load_for_long(cases: list[Case], server: Completions, narrow: Completions):
    for seed in range(4):
        assert asyncio.run(mixed(server, cases, requests=200, seed=seed, at_once=32)) == []
        assert asyncio.run(mixed(narrow, cases, requests=200, seed=seed, at_once=32)) == []


def test_chunks_of_64_tokens(cases: list[Case], narrow: Completions):
    # The longest first: the others then find blocks that are not empty, the prompt of one token among them.
    order = cases[::-1]
    check(order, narrow.one_by_one(case.asked for case in order))


def test_chunks_of_64_tokens_while_others_stream(cases: list[Case], narrow: Completions):
    # 1,025 tokens are 17 chunks or more, and every stream gets a token in all but the first of these steps.
    # No longer answers than 300 tokens: there is no room for them.
    check_prompts_beside_streams(cases, narrow, [1500, 1025], 300, least=16)


def test_preempted_requests_are_computed_again(growing: list[Case], narrow: Completions):
    before = narrow.metric("vllm:num_preemptions_total")
    check_all_at_once(growing, narrow, seed=5)  # 15 fit at first, 10 at the end
    assert narrow.metric("vllm:num_preemptions_total") > before


def test_random_load_short_of_blocks(cases: list[Case], growing: list[Case], narrow: Completions):
    assert asyncio.run(mixed(narrow, [*cases, *growing], requests=40, seed=6, at_once=32)) == []
