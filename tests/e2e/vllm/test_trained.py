"""The small trained model remembers: it answers what it is asked about a log, cold and warm, many at once."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from examples.demo_model.conversations import KINDS, Asker, make_log
from kimi_demo.demo import TRAINED
from kimi_demo.server import Server
from tests.support.cold_runs import cold_run
from tests.support.completions import Completions
from tests.support.logs import ask_all

FLAGS = (
    "--dtype=float32",
    "--max-model-len=8192",
    "--kv-cache-memory-bytes=256M",
    "--max-num-batched-tokens=512",  # the log is read in chunks
    "--enable-prompt-tokens-details",
)
NGRAM = '--speculative-config={"method":"ngram","num_speculative_tokens":2,"prompt_lookup_max":3}'


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


def test_drafts_in_steps_without_room_for_all(servers: Callable[..., Server]):
    """A long prompt in front takes most of every step: of those that decode, each is left out of some."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED / "checkpoint")
    rng = random.Random(1)

    def text(tokens: int) -> list[int]:
        return tokenizer.encode(make_log(rng, tokens + 50).text, add_special_tokens=False)[:tokens]

    block = 112  # tokens: a block, which is found again, and one to begin with
    prompts, long = [text(block + 1) for _ in range(40)], text(8000)
    server = Completions(servers(TRAINED / "checkpoint", *FLAGS[:-2], f"--max-num-batched-tokens={block + 40}", NGRAM))

    async def beside_a_long_prompt() -> list[str | None]:
        async with server.connect() as client:
            cases = []
            for first in range(0, len(prompts), 4):  # so few that each step has room for all
                few = prompts[first : first + 4]
                cases += await asyncio.gather(*(cold_run(server, client, prompt, 40) for prompt in few))
            await asyncio.gather(*(server.ask(client, prompt, 1) for prompt in prompts))  # now cached without a salt
            reading = asyncio.create_task(server.ask(client, long, 1))
            while not server.metric("vllm:num_requests_running"):
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(server.ask(client, case.prompt, 40) for case in cases))
            await reading
            return [case.differs(answer.tokens) for case, answer in zip(cases, answers, strict=True)]

    assert [fault for fault in asyncio.run(beside_a_long_prompt()) if fault] == []
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_the_checkpoint_is_small():
    files = [path for path in Path(TRAINED).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12_000_000
