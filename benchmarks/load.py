"""Requests of token ids to a running server, streamed, with the time of every token."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any

import httpx


@dataclass
class Reply:
    """One answer: when it was asked for, and for every piece of it when it came and how many tokens it had."""

    asked: float
    times: list[float] = field(default_factory=list)  # s
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0  # prompt tokens found in the prefix cache

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.asked

    @property
    def tpot(self) -> float:
        """Seconds a token after the first."""
        return (self.times[-1] - self.times[0]) / max(sum(self.counts[1:]), 1)


class Load:
    """A client of one server; `vocab` bounds the random token ids. Greedy.

    What is sent together has `limit` seconds, after which TimeoutError is raised; every request carries `extra`, and
    `begun` is released once for each at its first token.
    """

    def __init__(self, url: str, model: str, vocab: int, seed: int = 0) -> None:
        self.url, self.model = url, model
        self.random = random.Random(seed)
        self.vocab = vocab
        self.limit: float | None = None
        self.extra: dict[str, Any] = {}
        self.begun = Semaphore(0)

    def prompt(self, length: int) -> list[int]:
        return self.random.choices(range(32, self.vocab - 64), k=length)

    async def ask(self, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int) -> Reply:
        """Stream `tokens` tokens. Raises RuntimeError with the server's words for any other answer."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **self.extra,
        }
        reply = Reply(time.perf_counter())
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            if stream.status_code != 200:
                raise RuntimeError((await stream.aread()).decode(errors="replace"))
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                for choice in event["choices"]:
                    if choice.get("token_ids"):
                        if not reply.times:
                            self.begun.release()
                        reply.times.append(time.perf_counter())
                        reply.counts.append(len(choice["token_ids"]))
                        reply.tokens += choice["token_ids"]
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                reply.cached = details.get("cached_tokens") or reply.cached
        if len(reply.tokens) != tokens:
            raise RuntimeError(f"{len(reply.tokens)} tokens came where {tokens} were asked for")
        return reply

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)  # vLLM closes idle ones after five seconds
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False) as client:
            yield client

    def at_once(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Reply]:
        async def run() -> list[Reply]:
            async with self.connect() as client:
                return await asyncio.gather(*(self.ask(client, prompt, tokens) for prompt in prompts))

        return asyncio.run(asyncio.wait_for(run(), self.limit))

    def poisson(self, prompts: Sequence[Sequence[int]], tokens: int, rate: float) -> list[Reply]:
        """One request after another, `rate` a second on average, at random times."""

        async def later(client: httpx.AsyncClient, prompt: Sequence[int], seconds: float) -> Reply:
            await asyncio.sleep(seconds)
            return await self.ask(client, prompt, tokens)

        async def run() -> list[Reply]:
            moments, now = [], 0.0
            for _ in prompts:
                moments.append(now)
                now += self.random.expovariate(rate)
            async with self.connect() as client:
                return await asyncio.gather(*(later(client, p, at) for p, at in zip(prompts, moments, strict=True)))

        return asyncio.run(asyncio.wait_for(run(), self.limit))


def late_tpot(reply: Reply) -> float:
    """Seconds a token in the second half of an answer: after a very long prompt the first pieces come in a bunch."""
    middle = len(reply.times) // 2
    return (reply.times[-1] - reply.times[middle]) / sum(reply.counts[middle + 1 :])


def steady_tpot(replies: Sequence[Reply]) -> float:
    """Median over the requests of the seconds a token while all of them decode."""
    begin = max(reply.times[0] for reply in replies)
    end = min(reply.times[-1] for reply in replies)
    rates = []
    for reply in replies:
        inside = [(t, n) for t, n in zip(reply.times, reply.counts, strict=True) if begin <= t <= end]
        if len(inside) > 1:
            rates.append((inside[-1][0] - inside[0][0]) / sum(n for _, n in inside[1:]))
    return statistics.median(rates)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
