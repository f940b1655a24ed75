"""A client of a running server's /v1/completions for tests: token ids in, token ids and logprobs out, many at once."""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from kimi_demo.server import Server
from tests.support import patience


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]  # of the tokens
    cached_tokens: int  # tokens of the prompt found in the prefix cache, where the server reports them


class Completions:
    """Greedy completions of token-id prompts; every answer has exactly the asked number of tokens.

    Without `logprobs` a step samples as for a client that asks for tokens alone, on GPUs in a launch of our own.
    """

    def __init__(self, server: Server, logprobs: bool = True) -> None:
        self.server, self.logprobs = server, 0 if logprobs else None

    @staticmethod
    def salt(cold: bool) -> dict[str, Any]:
        """For a `cold` request a salt that no other request has, so that nothing cached fits it."""
        return {"cache_salt": uuid.uuid4().hex} if cold else {}

    def connect(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)  # vLLM closes idle ones after five seconds
        return httpx.AsyncClient(base_url=self.server.url, timeout=patience.SECONDS, limits=limits, trust_env=False)

    def body(self, prompt: Sequence[int], tokens: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.server.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": self.logprobs,
            "return_token_ids": True,
            **more,
        }

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The whole reply to one request."""
        reply = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=patience.SECONDS, trust_env=False)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def ask(self, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int, **more: Any) -> Answer:
        reply = await client.post("/v1/completions", json=self.body(prompt, tokens, **more))
        assert reply.status_code == 200, reply.text
        found = reply.json()
        choice, usage = found["choices"][0], found["usage"]
        assert usage["prompt_tokens"] == len(prompt)
        details = usage.get("prompt_tokens_details") or {}
        logprobs = [] if self.logprobs is None else choice["logprobs"]["token_logprobs"]
        answer = Answer(choice["token_ids"], logprobs, details.get("cached_tokens") or 0)
        assert len(answer.tokens) == usage["completion_tokens"] == tokens
        assert len(logprobs) == (0 if self.logprobs is None else tokens)
        return answer

    async def stream(
        self, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int, **more: Any
    ) -> AsyncGenerator[Answer, None]:
        """The answer so far, each time it grows."""
        body = self.body(prompt, tokens, stream=True, **more)
        answer = Answer([], [], 0)
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    if choice["token_ids"]:
                        answer.tokens.extend(choice["token_ids"])
                        answer.logprobs.extend(choice["logprobs"]["token_logprobs"])
                        yield answer

    def at_once(self, asked: Iterable[tuple[Sequence[int], int]], cold: bool = False) -> list[Answer]:
        """All (prompt, tokens) sent together, in this order; `cold` ones find nothing in a prefix cache."""

        async def run() -> list[Answer]:
            async with self.connect() as client:
                return await asyncio.gather(*(self.ask(client, *one, **self.salt(cold)) for one in asked))

        return asyncio.run(run())

    def one_by_one(self, asked: Iterable[tuple[Sequence[int], int]]) -> list[Answer]:
        """Each (prompt, tokens) sent when the one before is answered."""

        async def run() -> list[Answer]:
            async with self.connect() as client:
                return [await self.ask(client, *one) for one in asked]

        return asyncio.run(run())

    def metrics(self) -> str:
        return httpx.get(f"{self.server.url}/metrics", timeout=patience.SECONDS, trust_env=False).text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 while it has none."""
        total = 0.0
        for line in re.findall(rf"^{re.escape(name)}(?:{{.*}})? .*$", self.metrics(), re.MULTILINE):
            if all(f'{label}="{value}"' in line for label, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    async def until_idle(self, seconds: float = 60) -> None:
        """Return once no request runs or waits; fails if that does not come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.load:
                    await asyncio.sleep(0.1)
        assert self.load == 0, f"{self.load:.0f} requests still run or wait after {seconds:.0f} s"

    @property
    def load(self) -> float:
        """Requests that run or wait."""
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")
