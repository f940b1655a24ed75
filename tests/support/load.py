"""Random mixed load on a server: arrivals, lengths and cancellations at random, every answer checked."""

import asyncio
import contextlib
import random
from collections.abc import Sequence

import httpx

from tests.support.completions import Answer, Completions
from tests.support.prompts import Case, difference

ENDLESS = 4000  # tokens: an answer that has not ended when its client leaves, however late that is


async def cancelled(
    server: Completions, client: httpx.AsyncClient, case: Case, after: int, tokens: int | None = None
) -> Answer:
    """Ask and hang up once `after` tokens have come; with 0, while the prompt waits or is being read.

    `tokens` of an answer, if not as many as the case's.
    """
    answer = Answer([], [], 0)
    stream = server.stream(client, case.prompt, tokens or len(case.score.answer))
    if after == 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(stream)
    else:
        async for answer in stream:
            if len(answer.tokens) >= after:
                break
    await stream.aclose()
    return first(answer, case)


def first(answer: Answer, case: Case) -> Answer:
    """As much of an answer as the case has."""
    tokens = len(case.score.answer)
    return Answer(answer.tokens[:tokens], answer.logprobs[:tokens], answer.cached_tokens)


async def mixed(server: Completions, cases: Sequence[Case], requests: int, seed: int, at_once: int = 12) -> list[str]:
    """Send `requests` of the cases, up to `at_once` together; returns what was wrong, nothing if all is well.

    A request asks for the first few or all tokens of a case's answer; one in four hangs up early.
    """
    choose = random.Random(seed)
    places = asyncio.Semaphore(at_once)
    faults: list[str] = []

    async def one(case: Case, tokens: int, leaves_after: int | None) -> None:
        async with places:
            await asyncio.sleep(choose.random() * 0.1)
            if leaves_after is None:
                answer = await server.ask(client, case.prompt, tokens)
            else:
                answer = await cancelled(server, client, case, leaves_after)
        if fault := difference(case, answer):
            faults.append(fault)

    async with server.connect() as client, asyncio.TaskGroup() as tasks:
        for _ in range(requests):
            case = choose.choice(cases)
            tokens = choose.randint(1, len(case.score.answer))
            leaves_after = choose.randint(0, tokens - 1) if choose.random() < 0.25 else None
            tasks.create_task(one(case, tokens, leaves_after))
    await server.until_idle()
    return faults
