"""Part 1: one `vllm serve` with drafts, a prefix cache that evicts, and more requests than fit."""

import asyncio
import json
import time
from pathlib import Path

import httpx

from kimi_demo.demo import TRAINED
from kimi_demo.server import Server
from tests.soak.asking import Tally, ask, cold
from tests.soak.traffic import LONGEST, TOKENS, Asked, Traffic
from tests.support.completions import Completions
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

CONTEXT = 10 * 1024  # of the longest sequence
CACHE_SEQUENCES = 3  # of that length: less than runs at once, so that blocks are evicted and requests preempted
AT_ONCE = 32
NEW_CASES, STORM = 8, 60  # of a round
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
IDLE_SECONDS = 300  # in which what was left must be gone


class DeadEngineError(Exception):
    """The server ended, or answers no longer."""


def server(folder: Path, gpu: bool, drafts: bool, prefix_caching: bool) -> Server:
    model = TRAINED / "checkpoint"
    dtype = "bfloat16" if gpu else "float32"
    model_sizes = ModelSizes.from_config(json.loads((model / "config.json").read_text()))
    plan = layout.cache_layout(model_sizes, activation_dtype=dtype, kv_bytes=1 << 30, prefix_caching=prefix_caching)
    flags = [
        f"--dtype={dtype}",
        f"--max-model-len={CONTEXT}",
        f"--kv-cache-memory-bytes={CACHE_SEQUENCES * plan.bytes_per_sequence(CONTEXT)}",
        "--gpu-memory-utilization=0.1",
        "--max-num-batched-tokens=1024",
        f"--max-num-seqs={AT_ONCE}",
        "--enable-prompt-tokens-details",
        "--enable-force-include-usage",
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
        *([f"--speculative-config={json.dumps(DRAFTS)}"] if drafts else []),
    ]
    env = {} if gpu else {"OMP_NUM_THREADS": "1"}
    return Server(model, flags, log_path=folder / "server.log", env=env)


def traffic(running: Server, seed: int, drafts: bool) -> Traffic:
    assert CONTEXT > LONGEST + 256
    return Traffic(running.model, CONTEXT, seed, drafts)


async def rounds(completions: Completions, asked: Traffic, tally: Tally, folder: Path, until: float) -> int:
    """Rounds until a time of time.monotonic(), at least one; returns how many. Raises DeadEngineError."""
    done = 0
    async with completions.connect() as client:
        while not done or time.monotonic() < until:
            await one_round(completions, client, asked, tally, folder)
            done += 1
            say(done, tally)
    return done


async def one_round(
    completions: Completions, client: httpx.AsyncClient, asked: Traffic, tally: Tally, folder: Path
) -> None:
    """New prompts, each alone and cold; then many at once, new and old ones; then a pause in which nothing is left."""
    await renew(client, asked, tally)
    places = asyncio.Semaphore(AT_ONCE + 8)  # some wait

    async def one(each: Asked) -> None:
        async with places:
            await ask(client, each, tally)

    await asyncio.gather(*map(one, asked.storm(STORM)))
    await until_idle(completions, tally)
    await ask_again(client, asked, tally, folder)


async def ask_again(client: httpx.AsyncClient, asked: Traffic, tally: Tally, folder: Path) -> None:
    """Prompts that were answered wrongly, once more with nothing else running, cold and not; all into wrong.json."""
    for found in tally.wrong_answers:
        if "cold again" in found:
            continue
        prompt = found["body"]["prompt"]
        for name, body in (("cold again", asked.cold(prompt)), ("alone", asked.body(prompt, TOKENS, logprobs=2))):
            try:
                found[name] = (await cold(client, body)).tokens
            except (AssertionError, httpx.HTTPError) as error:
                found[name] = repr(error)
    if tally.wrong_answers:
        (folder / "wrong.json").write_text(json.dumps(tally.wrong_answers))


async def renew(client: httpx.AsyncClient, asked: Traffic, tally: Tally) -> None:
    """New documents, and cases of them."""
    asked.open_round()
    for _ in range(NEW_CASES):
        body = asked.cold(asked.prompt())
        try:
            asked.cases.append(await cold(client, body))
        except (AssertionError, httpx.HTTPError) as error:
            tally.faults.append(f"a cold prompt of {len(body['prompt'])} tokens was not answered: {error!r}")


async def until_idle(completions: Completions, tally: Tally) -> None:
    """Wait until no request runs or waits and no block is held; what stays is a fault."""
    end = time.monotonic() + IDLE_SECONDS
    while True:
        check_alive(completions.server)
        try:
            left = {
                name: completions.metric(f"vllm:{name}")
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
        except httpx.HTTPError:
            continue  # it may have died between the two: look again
        if not any(left.values()):
            return
        if time.monotonic() > end:
            tally.faults.append(f"left when idle: {left}")
            return
        await asyncio.sleep(0.2)


def check_alive(server: Server) -> None:
    """Raises DeadEngineError."""
    if server.process is None or server.process.poll() is not None:
        raise DeadEngineError("the server ended")
    end = time.monotonic() + 120
    while not server.is_healthy():
        if server.process.poll() is not None or time.monotonic() > end:
            raise DeadEngineError("/health does not answer 200")
        time.sleep(1)


def say(done: int, tally: Tally) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.ended.items()))
    print(
        f"round {done}: {counts}; {tally.compared} tokens compared, {len(tally.wrong)} wrong, "
        f"{len(tally.faults)} faults",
        *tally.news(),
        sep="\n  ",
        flush=True,
    )
