"""Short questions while long prompts are read, in every way to reach a model."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gateway.peers import peer
from benchmarks.gateway.process import gateway
from benchmarks.load import Load
from kimi_demo.server import Server

FLAGS = ("--dtype=float32", "--max-model-len=131072", "--kv-cache-memory-bytes=1G", "--max-num-batched-tokens=2048")
THRESHOLD = ("--long-prefill-token-threshold=512",)
SHORT, ANSWER = 200, 4  # tokens of a question and of its answer
QUESTIONS, RATE = 64, 1.0  # of one run, and how many come a second


@dataclass(frozen=True)
class Way:
    """How the questions reach a model.

    gateway: the `admission` of its configuration; None for none at all. peer: the name of another program instead.
    """

    name: str
    flags: tuple[str, ...] = ()
    replicas: int = 1
    gateway: dict[str, int] | None = None
    peer: str = ""
    longs: int = 1
    length: int = 100_000  # tokens of each long prompt

    @property
    def title(self) -> str:
        return f"{self.longs} x {self.length:,} tokens" if self.longs > 1 else f"one of {self.length:,} tokens"


ONE_AT_A_TIME = {"prefill_tokens": 36864, "short_reserve": 16384}
WAYS = {
    "bare": Way("`vllm serve`"),
    "flag": Way("`vllm serve`, threshold 512", THRESHOLD),
    "gateway": Way("gateway, 2 replicas", (), 2, {}),
    "gateway-flag": Way("gateway, 2 replicas, threshold 512", THRESHOLD, 2, {}),
    "router-flag": Way("vLLM's router, 2 replicas, threshold 512", THRESHOLD, 2, peer="vllm-router"),
    "litellm-flag": Way("LiteLLM, 2 replicas, threshold 512", THRESHOLD, 2, peer="litellm"),
    "several-flag": Way("`vllm serve`, threshold 512", THRESHOLD, longs=6, length=20_000),
    "several-gateway": Way("gateway, 1 replica, threshold 512", THRESHOLD, 1, ONE_AT_A_TIME, "", 6, 20_000),
}


@contextlib.contextmanager
def served(way: Way, model: Path, logs: Path, peers: Sequence[Path] = ()) -> Iterator[tuple[str, list[str]]]:
    """The servers of a way: the URL to ask, and those of the replicas."""
    with contextlib.ExitStack() as stack:
        env = {"OMP_NUM_THREADS": "1"}
        servers = [
            stack.enter_context(Server(model, (*FLAGS, *way.flags), log_path=logs / f"vllm-{number}.log", env=env))
            for number in range(way.replicas)
        ]
        urls = [server.url for server in servers]
        url = urls[0]
        if way.gateway is not None:
            url = stack.enter_context(gateway(urls, way.gateway, logs))
        for program in peers:
            if program.name == way.peer:
                url = stack.enter_context(peer(program, urls, str(model), logs))
        yield url, urls


async def question_times(load: Load, way: Way) -> dict[str, Any]:
    """One run: seconds to the first token of every question, and of the long prompts (None if still being read)."""
    async with load.connect() as client:
        longs = [asyncio.create_task(load.ask(client, load.prompt(way.length), 1)) for _ in range(way.longs)]
        await asyncio.sleep(3)
        questions = []
        for _ in range(QUESTIONS):
            questions.append(asyncio.create_task(load.ask(client, load.prompt(SHORT), ANSWER)))
            await asyncio.sleep(load.random.expovariate(RATE))
        reading = sum(not long.done() for long in longs)
        times = [reply.ttft for reply in await asyncio.gather(*questions)]
        done = [long.result().ttft for long in longs if long.done()]
        for long in longs:
            long.cancel()
        await asyncio.gather(*longs, return_exceptions=True)
    if not reading:
        raise RuntimeError("the long prompt was read before the last question came: make it longer")
    return {"questions": times, "long": done}
