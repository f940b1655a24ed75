"""The demo: serve the demo checkpoint, ask it through the OpenAI client, check the answer and the memory plan.

On a CPU it runs in fp32, and every token must be the reference's. On a GPU, where vLLM's latent attention has no
fp32, it runs in bf16: most tokens must be, and all whose lead over the second best is larger than bf16 can overturn.
"""

import contextlib
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openai import OpenAI

from vllm_kimi_linear import demo, memory
from vllm_kimi_linear.config import Geometry
from vllm_kimi_linear.launch import Server, StartError

if TYPE_CHECKING:
    from vllm_kimi_linear.oracle import Score

KV_BYTES = 256 << 20
FLAGS = ("--max-model-len=32768", f"--kv-cache-memory-bytes={KV_BYTES}")


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    seconds_to_first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate: the tokens after the first over the time after the first."""
        return (len(self.token_ids) - 1) / max(self.seconds - self.seconds_to_first, 1e-9)


def run(folder: Path, prompt: str, tokens: int) -> int:
    """Print the whole demo; returns 0 only if every token agrees with transformers and the plan holds."""
    model = folder / "model"
    dtype = "bfloat16" if _has_gpu() else "float32"
    with _step(f"Writing a small random checkpoint to {model}"):
        demo.write_checkpoint(model)
    server = Server(model, (f"--dtype={dtype}", *FLAGS), log_path=folder / "server.log")
    try:
        with _step("Starting vllm serve") as ticking:
            server.start(waiting=ticking)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        print(f"\nQuestion: {prompt}\nAnswer (random weights, so no sense is to be expected):\n")
        answer = _ask(server, prompt, tokens)
        blocks = _allocated_blocks(server)
    finally:
        server.stop()

    print(f"\n\n{answer.tokens_per_second:.0f} tokens/s, first token after {answer.seconds_to_first:.2f} s")
    planned = _print_memory(model, dtype, blocks)
    with _step("Asking the transformers reference in fp32"):
        score = _score(model, answer)
    agreeing = sum(a == b for a, b in zip(score.argmax, score.answer, strict=True))
    print(f"{agreeing} of {tokens} tokens agree with the transformers reference")
    if dtype == "float32":
        return 0 if planned and agreeing == tokens else 1
    wrong = score.clearly_wrong()
    print(f"{wrong} differ where the reference's choice leads by over {score.clear_lead}, more than bf16 overturns")
    return 0 if planned and not wrong and agreeing > tokens / 2 else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _ask(server: Server, prompt: str, tokens: int) -> Answer:
    """Stream one chat answer to the terminal."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    begun = time.monotonic()
    first = None
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            extra = {**(chunk.model_extra or {}), **(choice.model_extra or {})}
            prompt_ids = extra.get("prompt_token_ids") or prompt_ids
            token_ids += extra.get("token_ids") or []
            if choice.delta.content:
                first = first or time.monotonic()
                print(choice.delta.content, end="", flush=True)
    ended = time.monotonic()
    return Answer(prompt_ids, token_ids, (first or ended) - begun, ended - begun)


def _allocated_blocks(server: Server) -> int:
    """How many cache blocks the engine allocated, from its metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.search(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="(\d+)"', text)
    return int(found.group(1)) if found else 0


def _print_memory(model: Path, dtype: str, blocks: int) -> bool:
    """State and cache bytes from memory.py; False if its plan is not what the engine allocated."""
    geometry = Geometry.from_config(json.loads((model / "config.json").read_text()))
    plan = memory.plan(geometry, activation_dtype=dtype, kv_bytes=KV_BYTES)
    print(
        f"KDA state {plan.kda_state_bytes_per_sequence / 2**20:.2f} MiB a sequence, whatever its length; "
        f"MLA cache {plan.mla_bytes_per_token} bytes a token"
    )
    print(f"Cache blocks of {plan.block_tokens} tokens: {plan.num_blocks} planned, {blocks} allocated")
    return plan.num_blocks == blocks


def _score(model: Path, answer: Answer) -> "Score":
    """What the reference says of the answer."""
    from vllm_kimi_linear.oracle import Oracle

    return Oracle(model).score(answer.prompt_ids, answer.token_ids)


@contextlib.contextmanager
def _step(what: str) -> Iterator:
    """Say what is under way, tick while it lasts, say how long it took."""
    begun = time.monotonic()
    print(f"{what} ", end="", flush=True)
    last = begun

    def ticking(seconds: float) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(".", end="", flush=True)

    yield ticking
    print(f" {time.monotonic() - begun:.1f} s", flush=True)
