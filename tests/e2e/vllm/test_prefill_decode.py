"""Prompts read by one server and answered by another: tokens are those of one server, and neither needs the other.

Between them is the P2P tier of vLLM's OffloadingConnector, which moves what is offloaded, latents and kept states, by
NIXL from host memory to host memory. `pip install nixl`; the copies into the cache are those of `test_offloading.py`.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kimi_demo.server import Server, free_port
from kimi_demo.subject import TRAINED
from tests.conftest import TWO_WORKERS, ServerPool
from tests.e2e.vllm.test_offloading import ENV, FLAGS, NGRAM, SMALL, connector, documents
from tests.support import patience
from tests.support.completions import Completions
from tests.support.gateway_process import GatewayProcess
from tests.support.load import mixed
from tests.support.prefill_decode import PrefillDecode
from tests.support.prompts import Case, check

__all__ = ["documents"]
pytestmark = pytest.mark.nixl

WAYS = {
    "one rank": (),
    "two ranks": ("--tensor-parallel-size=2",),
    "drafts": (NGRAM,),
}


def flags(port: int, *more: str, **settings: Any) -> tuple[str, ...]:
    tier = {"type": "p2p", "host": "127.0.0.1", "port": port, **settings}
    return (*FLAGS, *SMALL, connector(1 << 28, "HostTieringSpec", secondary_tiers=[tier]), *more)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(demo_model: Path, tmp_path: Path) -> Iterator[Callable[..., PrefillDecode]]:
    """`pair(*flags, env=..., of_prefill=...)`: two servers with those flags, the first with some more."""
    pool = ServerPool(tmp_path)

    def start(*more: str, env: dict[str, str] | None = None, of_prefill: tuple[str, ...] = ()) -> PrefillDecode:
        port = free_port()
        first = pool(demo_model, *flags(port, *more, *of_prefill), env=ENV | (env or {}))
        second = pool(demo_model, *flags(free_port(), *more), env=ENV | (env or {}))
        return PrefillDecode(first, second, port)

    yield start
    pool.close()


def received(decode: Completions) -> float:
    """Tokens of prompts that came from the other server."""
    return decode.metric("vllm:prompt_tokens_cached_by_source_total", source="p2p")


def test_tokens_are_those_of_one_server(way: str, pair: Callable[..., PrefillDecode], documents: list[Case]):
    both = pair(*WAYS[way], env=TWO_WORKERS if way == "two ranks" else {})
    check(documents, both.one_by_one(case.asked for case in documents))
    prompts = sum(len(case.prompt) for case in documents)
    assert received(both) > 0.9 * prompts
    # Aborts, evictions and preemptions on both sides.
    assert asyncio.run(mixed(both, documents, requests=60, seed=61, at_once=12)) == []
    # And where it is asked first what is there, each prompt new to both.
    both.probe = True
    before = received(both)
    check(documents, both.one_by_one(case.asked for case in documents))
    check(documents, both.at_once([case.asked for case in documents], cold=True))
    assert received(both) > before + 0.7 * prompts


class ThroughGateway(Completions):
    """Of a server, asked by way of a gateway."""

    def __init__(self, server: Server, gateway: GatewayProcess) -> None:
        super().__init__(server)
        self.gateway = gateway

    def connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.gateway.url, timeout=patience.SECONDS, trust_env=False)


def test_the_gateway_has_long_prompts_read_elsewhere(
    pair: Callable[..., PrefillDecode], documents: list[Case], tmp_path: Path
):
    both = pair()
    prefill = [{"url": both.prefill.server.url, "p2p": f"127.0.0.1:{both.port}"}]
    admission = {"short_prompt": 500, "short_reserve": 1000}
    long = sum(len(case.prompt) for case in documents if len(case.prompt) > 500)
    with GatewayProcess(tmp_path, [both.server.url], prefill=prefill, admission=admission) as gateway:
        through = ThroughGateway(both.server, gateway)
        check(documents, through.one_by_one(case.asked for case in documents))
        assert 0.9 * long < received(both) <= long
        assert asyncio.run(mixed(through, documents, requests=60, seed=62, at_once=12)) == []


def test_chat_and_messages_by_the_gateway(tmp_path: Path):
    """The trained model, about texts that neither server has read."""
    pool, port = ServerPool(tmp_path), free_port()
    tier = {"type": "p2p", "host": "127.0.0.1"}
    prefill, decode = (
        pool(TRAINED / "checkpoint", *FLAGS[2:], "--dtype=float32", "--max-model-len=8192", handed, env=ENV)
        for handed in (
            connector(1 << 28, "HostTieringSpec", secondary_tiers=[tier | {"port": each}])
            for each in (port, free_port())
        )
    )
    text = (TRAINED / "log.jsonl").read_text()
    answered = Completions(decode)

    def ask(url: str, path: str, start: int) -> Any:
        content = f"{text[start : start + 6000]}\n\nWhat is the code of the last entry?"
        body = {
            "model": str(TRAINED / "checkpoint"),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 24,
        }
        reply = httpx.post(f"{url}{path}", json=body | {"temperature": 0}, timeout=patience.SECONDS, trust_env=False)
        assert reply.status_code == 200, reply.text
        found = reply.json()
        return found["content"] if path == "/v1/messages" else found["choices"][0]["message"]["content"]

    try:
        places = [{"url": prefill.url, "p2p": f"127.0.0.1:{port}"}]
        admission = {"short_prompt": 500, "short_reserve": 1000}
        with GatewayProcess(tmp_path, [decode.url], prefill=places, admission=admission) as gateway:
            for path, start in (("/v1/chat/completions", 0), ("/v1/messages", 20_000)):
                before = received(answered)
                found = ask(gateway.url, path, start)
                assert received(answered) > before + 500
                assert found == ask(prefill.url, path, start)
            # What the prefill server has in its cache already is found in its host memory.
            wanted, before = ask(prefill.url, "/v1/chat/completions", 30_000), received(answered)
            assert ask(gateway.url, "/v1/chat/completions", 30_000) == wanted
            assert received(answered) > before + 500
    finally:
        pool.close()


def test_a_prefill_server_killed_loses_nothing_of_the_other(pair: Callable[..., PrefillDecode], documents: list[Case]):
    both = pair()
    check(documents, both.one_by_one(case.asked for case in documents))

    async def kill_while_asked() -> None:
        async with both.connect() as client, asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(both.ask(client, *case.asked, **both.salt(True))) for case in documents * 2]
            while both.load == 0:
                await asyncio.sleep(0.05)
            process = both.prefill.server.process
            assert process is not None
            os.killpg(process.pid, signal.SIGKILL)
        check(documents * 2, [answer.result() for answer in answers])
        await Completions.until_idle(both)

    asyncio.run(kill_while_asked())
    check(documents, both.at_once([case.asked for case in documents], cold=True))  # nobody is there to read them


def test_a_decode_server_killed_leaves_the_other_as_it_was(pair: Callable[..., PrefillDecode], documents: list[Case]):
    both = pair()

    async def kill_while_asked() -> None:
        async with both.connect() as client:
            asked = [asyncio.create_task(both.ask(client, *case.asked)) for case in documents]
            while both.load == 0:
                await asyncio.sleep(0.05)
            process = both.server.process
            assert process is not None
            os.killpg(process.pid, signal.SIGKILL)
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(kill_while_asked())
    check(documents, both.prefill.at_once(case.asked for case in documents))


def test_prefixes_of_other_weights_are_not_taken(pair: Callable[..., PrefillDecode], documents: list[Case]):
    both = pair(of_prefill=("--seed=1",))
    check(documents, both.one_by_one(case.asked for case in documents))
    assert received(both) == 0


def test_a_prompt_that_nobody_read(pair: Callable[..., PrefillDecode], documents: list[Case]):
    """A name that is not known, a port where nobody is: the prompt is read by the server that is asked."""
    both = pair()
    decode, nowhere = Completions(both.server), free_port()
    place = {"remote_host": "127.0.0.1", "remote_port": both.port, "kv_request_id": "unknown"}
    asked = [
        {"remote_prefiller": place},
        {"remote_kv_source": place},
        {"remote_prefiller": place | {"remote_port": nowhere}},
        {"remote_kv_source": place | {"remote_port": nowhere}},
        {"remote_prefiller": place | {"remote_port": "x"}},
        {"remote_prefiller": {}},
        {"remote_decoder": {}},
    ]

    async def run() -> None:
        async with decode.connect() as client:
            for params, case in zip(asked, documents * 2, strict=False):
                answer = await decode.ask(client, *case.asked, kv_transfer_params=params, **decode.salt(True))
                check([case], [answer])

    asyncio.run(run())
