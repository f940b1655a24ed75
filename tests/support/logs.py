"""Questions about a log, asked of a server of the small trained model."""

import asyncio

from openai import AsyncOpenAI

from examples.demo_model.conversations import Log, Question
from kimi_demo.server import Server
from tests.support import patience


async def ask_all(server: Server, log: Log, questions: list[Question]) -> list[tuple[str, int]]:
    """Answers and how many tokens of their prompts were cached."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=patience.SECONDS)

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
