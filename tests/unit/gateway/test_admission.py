"""Budgets, lanes, queues and turns, without any HTTP."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from kimi_server.gateway.admission import Admission, Grant
from kimi_server.gateway.config.settings import AdmissionSettings
from kimi_server.gateway.errors import GatewayError

SETTINGS = AdmissionSettings(prefill_tokens=1000, short_prompt=50, short_reserve=200, queue=8, deadline_seconds=30)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(bounded())


def only(*replicas: int) -> Callable[[], list[int]]:
    return lambda: list(replicas)


async def waiting(admission: Admission, key: str, tokens: int) -> asyncio.Task[Grant]:
    """A request that has asked and got nothing yet."""
    task = asyncio.create_task(admission.enter(key, tokens, only(0)))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_short_prompts_pass_while_long_ones_fill_their_part() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        long = await admission.enter("a", 900_000, only(0))
        assert long.tokens == 800  # as much as there is for long prompts
        later = await waiting(admission, "a", 300)
        shorts = [await admission.enter("b", 50, only(0)) for _ in range(4)]
        assert [grant.lane for grant in shorts] == ["short"] * 4
        fifth = await waiting(admission, "b", 50)
        shorts[0].release()
        assert (await fifth).lane == "short"
        long.release()
        assert (await later).lane == "long"

    run(test)


def test_short_prompts_use_what_no_long_one_waits_for() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        shorts = [await admission.enter("a", 50, only(0)) for _ in range(20)]  # all of the budget
        long = await waiting(admission, "a", 500)
        short = await waiting(admission, "b", 50)  # beyond the reserve now, which the long one waits for
        for grant in shorts[:10]:
            grant.release()
        assert (await long).lane == "long"
        assert not short.done()
        for grant in shorts[10:]:
            grant.release()
        await short

    run(test)


def test_a_large_prompt_is_not_overtaken_in_its_lane() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        first, second = [await admission.enter("a", 400, only(0)) for _ in range(2)]
        large = await waiting(admission, "b", 800)
        small = await waiting(admission, "c", 100)
        first.release()
        await settle()
        assert not large.done() and not small.done()  # there is room for the small one, but it is not its turn
        second.release()
        (await large).release()
        await small

    run(test)


def test_keys_take_turns() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        order: list[str] = []

        async def ask(key: str) -> None:
            grant = await admission.enter(key, 800, only(0))
            order.append(key)
            await settle()
            grant.release()

        held = await admission.enter("x", 800, only(0))
        async with asyncio.TaskGroup() as tasks:
            for key in "aaaabbc":
                tasks.create_task(ask(key))
            await settle()
            held.release()
        assert order == list("abcabaa")

    run(test)


def test_a_deadline_ends_the_wait() -> None:
    async def test() -> None:
        admission = Admission(AdmissionSettings(deadline_seconds=0.05), 1)
        grant = await admission.enter("a", 1 << 20, only(0))
        with pytest.raises(GatewayError) as refused:
            await admission.enter("a", 5000, only(0))
        assert (refused.value.status, refused.value.reason) == (503, "deadline")
        assert refused.value.retry_after
        assert admission.waiting("long") == 0
        grant.release()
        assert admission.outstanding == [{"short": 0, "long": 0}]

    run(test)


def test_a_full_queue_turns_away_the_last_of_the_key_with_most_waiting() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        held = await admission.enter("greedy", 800, only(0))
        greedy = [await waiting(admission, "greedy", 800) for _ in range(8)]
        with pytest.raises(GatewayError) as refused:
            await admission.enter("greedy", 800, only(0))
        assert (refused.value.status, refused.value.reason) == (503, "queue_full")
        modest = await waiting(admission, "modest", 800)
        with pytest.raises(GatewayError):
            await greedy[-1]
        assert not any(task.done() for task in greedy[:-1])
        held.release()
        (await greedy[0]).release()
        (await modest).release()
        for task in greedy[1:-1]:
            (await task).release()
        assert admission.outstanding == [{"short": 0, "long": 0}]

    run(test)


def test_a_request_cancelled_in_the_same_moment_is_not_turned_away() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        held = await admission.enter("greedy", 800, only(0))
        greedy = [await waiting(admission, "greedy", 800) for _ in range(8)]
        modest = asyncio.create_task(admission.enter("modest", 800, only(0)))
        greedy[-1].cancel()  # leaves its line after `modest` has come
        await settle()
        assert greedy[-1].cancelled()
        assert not any(task.done() for task in (*greedy[:-1], modest))
        for task in (*greedy[:-1], modest):
            task.cancel()
        await asyncio.gather(*greedy, modest, return_exceptions=True)
        held.release()
        assert not any(admission.queues.values())

    run(test)


def test_the_next_replica_takes_what_the_first_has_no_room_for() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 3)
        grants = [await admission.enter("a", 800, only(1, 2, 0)) for _ in range(3)]
        assert [(grant.replica, grant.affinity_miss) for grant in grants] == [(1, False), (2, True), (0, True)]
        # A short prompt prefers the one that reads no long prompt.
        grants[2].release()
        assert (await admission.enter("a", 10, only(1, 2, 0))).replica == 0

    run(test)


def test_no_replica_refuses_those_who_wait() -> None:
    async def test() -> None:
        up = [0]
        admission = Admission(SETTINGS, 1)
        held = await admission.enter("a", 800, lambda: up)
        task = asyncio.create_task(admission.enter("a", 800, lambda: up))
        await settle()
        up.clear()
        admission.dispatch()
        with pytest.raises(GatewayError) as refused:
            await task
        assert refused.value.reason == "no_replica"
        held.release()
        up.append(0)
        (await admission.enter("a", 800, lambda: up)).release()

    run(test)


def test_closing_refuses_all() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        held = await admission.enter("a", 800, only(0))
        task = await waiting(admission, "a", 800)
        admission.close()
        for one in (task, asyncio.create_task(admission.enter("b", 1, only(0)))):
            with pytest.raises(GatewayError) as refused:
                await one
            assert refused.value.reason == "draining"
        held.release()

    run(test)


def test_a_cancelled_request_gives_back_what_it_got_in_the_same_moment() -> None:
    async def test() -> None:
        admission = Admission(SETTINGS, 1)
        held = await admission.enter("a", 800, only(0))
        task = await waiting(admission, "a", 800)
        held.release()  # grants, but the task has not run since
        assert admission.outstanding[0]["long"] == 800
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert admission.outstanding[0]["long"] == 0

    run(test)


@pytest.mark.parametrize("deadline", [0.05, 60])
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_requests_that_leave_at_any_time_leave_nothing(seed: int, deadline: float) -> None:
    """Held, waiting, cancelled, refused, released twice: at no time above the budget, at the end nothing left.

    They come, hold and leave by rounds of the event loop, so that all but the deadline is as drawn on any machine.
    """

    async def test() -> None:
        choose = random.Random(seed)
        settings = AdmissionSettings(
            prefill_tokens=1000, short_prompt=50, short_reserve=200, queue=60, deadline_seconds=deadline
        )
        admission = Admission(settings, 2)
        outcomes: dict[str, int] = {}

        async def rounds(most: int) -> None:
            for _ in range(choose.randrange(most)):
                await asyncio.sleep(0)

        async def one() -> None:
            await rounds(1000)
            outcome = "granted"
            try:
                tokens = choose.choice([1, 20, 50, 51, 300, 5000])
                grant = await admission.enter(choose.choice("abcd"), tokens, only(*choose.sample([0, 1], 2)))
                for lanes in admission.outstanding:
                    assert 0 <= lanes["long"] <= 800
                    assert sum(lanes.values()) <= 1000
                try:
                    await rounds(30)
                finally:
                    grant.release()
                    grant.release()
            except GatewayError as refusal:
                outcome = refusal.reason
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        tasks = [asyncio.create_task(one()) for _ in range(1000)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            choose.choice(tasks).cancel()
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert any(task.cancelled() for task in tasks)
        assert deadline < 1 or outcomes["granted"] > 100
        assert admission.outstanding == [{"short": 0, "long": 0}] * 2
        assert not any(admission.queues.values())

    run(test)
