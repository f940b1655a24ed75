"""The small trained model remembers: it answers what it is asked about a log, cold and warm, many at once."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from openai import AsyncOpenAI

from examples.demo_model.conversations import KINDS, Asker, Log, Question, make_log
from kimi_demo.demo import TRAINED
from kimi_demo.server import Server

FLAGS = (
    "--dtype=float32",
    "--max-model-len=8192",
    "--kv-cache-memory-bytes=256M",
    "--max-num-batched-tokens=512",  # the log is read in chunks
    "--enable-prompt-tokens-details",
)


async def ask_all(server: Server, log: Log, questions: list[Question]) -> list[tuple[str, int]]:
    """Answers and how many tokens of their prompts were cached."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)

    async def ask(question: Question) -> tuple[str, int]:
        reply = await client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": log.text + question.text}],
            temperature=0,
            max_tokens=64,
        )
        assert reply.usage and reply.usage.prompt_tokens_details
        return reply.choices[0].message.content or "", reply.usage.prompt_tokens_details.cached_tokens or 0

    async with client:
        return await asyncio.gather(*map(ask, questions))


def test_answers_are_right(servers: Callable[..., Server]):
    rng = random.Random(7)
    log = make_log(rng, 3000)
    asker = Asker(log, rng)
    questions = [asker.ask(kind) for kind in KINDS for _ in range(4)]
    server = servers(TRAINED / "checkpoint", *FLAGS)
    for cached_at_least in (0, 2500):
        replies = asyncio.run(ask_all(server, log, questions))
        wrong = [(q, text) for q, (text, _) in zip(questions, replies, strict=True) if text != q.answer]
        assert not wrong
        assert min(cached for _, cached in replies) >= cached_at_least


def test_the_checkpoint_is_small():
    files = [path for path in Path(TRAINED).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12_000_000
