"""Clients that leave at any moment leave nothing behind.

Answers to those who will leave are held before their end, so that how many leave is what was drawn, on any machine.
"""

import asyncio
import random
from dataclasses import dataclass

import httpx

from tests.support.gateway import Start
from tests.support.upstream import Upstream

COUNT, AT_ONCE, TOKENS = 1000, 40, 20
LEAVES = {"user": "leaves"}


@dataclass(frozen=True)
class Plan:
    """A request: how long its prompt is, and when its client leaves."""

    prompt: int
    stream: bool
    after_seconds: float | None  # wherever the request is then
    after_token: int | None  # of a stream

    @property
    def leaves(self) -> bool:
        return self.after_seconds is not None or self.after_token is not None

    @property
    def body(self) -> dict[str, object]:
        return {"prompt": [1] * self.prompt, "stream": self.stream, **(LEAVES if self.leaves else {})}


def draw(choose: random.Random) -> Plan:
    prompt = choose.choice([5, 500, 6000])
    match choose.choice(["at a time", "at a token", "at a token", "stays"]):
        case "at a time":
            return Plan(prompt, choose.random() < 0.5, choose.choice([0, 0.001, 0.03, 0.1]), None)
        case "at a token":
            return Plan(prompt, True, None, choose.randrange(TOKENS))
        case _:
            return Plan(prompt, choose.random() < 0.5, None, None)


async def ask(client: httpx.AsyncClient, plan: Plan) -> tuple[str, int] | None:
    """The request's id, and the status that its line in the log must have; None where the client left unanswered."""
    last = b"w%d " % plan.after_token if plan.after_token is not None else None
    try:
        async with (
            asyncio.timeout(plan.after_seconds),
            client.stream("POST", "/v1/completions", json=plan.body) as reply,
        ):
            received = b""
            async for piece in reply.aiter_raw():
                received += piece
                if last is not None and last in received:
                    return reply.headers["x-request-id"], 499
            return reply.headers["x-request-id"], reply.status_code
    except TimeoutError:
        return None


def test_a_thousand_random_disconnects_leave_no_budget_outstanding(start: Start) -> None:
    upstreams = [Upstream(hold=0.02, tokens=TOKENS, pace=0.002, held=lambda body: "user" in body) for _ in range(2)]
    gateway = start(*upstreams, admission={"prefill_tokens": 12000, "short_prompt": 1000, "short_reserve": 2000})
    choose = random.Random(0)
    plans = [draw(choose) for _ in range(COUNT)]
    known: dict[str, int] = {}

    async def one(client: httpx.AsyncClient, places: asyncio.Semaphore, plan: Plan) -> None:
        async with places:
            if ended := await ask(client, plan):
                known.update([ended])

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=120, limits=limits) as client,
            asyncio.TaskGroup() as tasks,
        ):
            places = asyncio.Semaphore(AT_ONCE)
            for plan in plans:
                tasks.create_task(one(client, places, plan))

    asyncio.run(run())
    gateway.until_idle()
    gateway.until(lambda: all(upstream.running == 0 for upstream in upstreams), "the replicas are idle too")
    stayed = sum(not plan.leaves for plan in plans)
    left = sum(plan.after_token is not None for plan in plans)
    assert sorted(known.values()) == [200] * stayed + [499] * left
    # Those who left unanswered are in the log too, where their request had arrived.
    statuses = {line["id"]: line["status"] for line in gateway.lines}
    assert statuses.items() >= known.items()
    assert set(statuses.values()) == {200, 499}
    assert list(statuses.values()).count(200) == stayed
