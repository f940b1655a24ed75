"""Clients that leave at any moment leave nothing behind."""

import asyncio
import random

import httpx

from tests.test_gateway.conftest import Start
from tests.upstream import Upstream

COUNT = 1000


def test_a_thousand_random_disconnects_leave_no_budget_outstanding(start: Start) -> None:
    upstreams = [Upstream(hold=0.02, tokens=20, pace=0.002) for _ in range(2)]
    gateway = start(*upstreams, admission={"prefill_tokens": 12000, "short_prompt": 1000, "short_reserve": 2000})
    choose = random.Random(0)
    ended: list[int] = []

    async def one(client: httpx.AsyncClient, places: asyncio.Semaphore) -> None:
        async with places:
            body = {"prompt": [1] * choose.choice([5, 500, 6000]), "stream": choose.random() < 0.7}
            try:
                async with asyncio.timeout(choose.choice([0.001, 0.03, 0.1, 30])):
                    async with client.stream("POST", "/v1/completions", json=body) as reply:
                        async for _ in reply.aiter_raw():
                            if choose.random() < 0.05:
                                return
                        ended.append(reply.status_code)
            except TimeoutError:
                pass

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=60, limits=limits) as client,
            asyncio.TaskGroup() as tasks,
        ):
            places = asyncio.Semaphore(40)
            for _ in range(COUNT):
                tasks.create_task(one(client, places))

    asyncio.run(run())
    gateway.until_idle()
    gateway.until(lambda: all(upstream.running == 0 for upstream in upstreams), "the replicas are idle too")
    assert set(ended) == {200}
    statuses = [line["status"] for line in gateway.lines]
    assert statuses.count(499) > COUNT / 10
    assert set(statuses) == {200, 499}
