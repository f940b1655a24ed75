"""The demo: serve the small trained model, have it read a log and answer questions, check all that it says.

Where that model is not at hand, as in an installed wheel, a random checkpoint answers one question. On a CPU the server
runs in fp32, and every token must be the reference's. On a GPU, where vLLM's latent attention has no fp32, it runs in
bf16: most tokens must be, and all whose lead over the second best is larger than bf16 can overturn.
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

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.server import Server, StartError
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

if TYPE_CHECKING:
    from kimi_demo.reference import Score

KV_BYTES = 256 << 20
FLAGS = (
    "--max-model-len=32768",
    f"--kv-cache-memory-bytes={KV_BYTES}",
    "--gpu-memory-utilization=0.1",  # on a GPU so much must be free, however large the cache
    "--enable-prompt-tokens-details",
)
TRAINED = Path(__file__).parents[1] / "demo_model"
PROMPT = "What do you remember of a very long document?"


@dataclass(frozen=True)
class Subject:
    """A model, a text that every question follows, and questions, with their answers where there are right ones."""

    model: Path
    text: str
    questions: list[tuple[str, str | None]]


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    cached_tokens: int
    seconds_to_first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate: the tokens after the first over the time after the first."""
        return (len(self.token_ids) - 1) / max(self.seconds - self.seconds_to_first, 1e-9)


def run(folder: Path, prompt: str | None, tokens: int) -> int:
    """Print the whole demo; returns 0 only if answers are right, tokens the reference's, and the plan holds."""
    subject = _subject(folder, prompt)
    dtype = "bfloat16" if _has_gpu() else "float32"
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(subject.model, (f"--dtype={dtype}", *FLAGS), log_path=folder / "server.log")
    try:
        with _step(f"Starting vllm serve {subject.model}") as ticking:
            server.start(waiting=ticking)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        answers, right = _converse(server, subject, tokens)
        blocks = _allocated_blocks(server)
    finally:
        server.stop()
    planned = _print_memory(subject.model, dtype, blocks)
    agreed = _agrees(subject.model, answers[0], exactly=dtype == "float32")
    return 0 if right and planned and agreed else 1


def _subject(folder: Path, prompt: str | None) -> Subject:
    """The trained model and its log; the random one if it is not at hand, or to answer a prompt of one's own."""
    if prompt is None and (TRAINED / "checkpoint" / "config.json").exists():
        sample = json.loads((TRAINED / "sample.json").read_text())
        asked = [(each["question"], each["answer"]) for each in sample["questions"]]
        return Subject(TRAINED / "checkpoint", sample["log"], asked)
    model = folder / "model"
    with _step(f"Writing a small checkpoint with random weights, which writes nonsense, to {model}"):
        write_checkpoint(model)
    return Subject(model, "", [(prompt or PROMPT, None)])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _converse(server: Server, subject: Subject, tokens: int) -> tuple[list[Answer], bool]:
    """Ask all questions, each in a conversation of its own; returns the answers, and whether all are right."""
    if subject.text:
        lines = subject.text.splitlines()
        print(f"\nBefore each question comes this log of {len(lines)} lines:\n")
        print("\n".join(f"    {line}" for line in (*lines[:3], "...", lines[-1])))
    answers, right = [], True
    for question, expected in subject.questions:
        print(f"\nQuestion: {question}\nAnswer:   ", end="")
        answer = _ask(server, subject.text + question, tokens, to_the_end=expected is None)
        verdict = "" if expected is None else "right, " if answer.text == expected else f"WRONG, not {expected}, "
        right = right and expected in (None, answer.text)
        computed = len(answer.prompt_ids) - answer.cached_tokens
        read = f"{len(answer.prompt_ids):,} tokens of prompt, {computed:,} of them computed"
        speed = f"first token after {answer.seconds_to_first:.2f} s, then {answer.tokens_per_second:.0f} tokens/s"
        print(f"\n          {verdict}{read}, {speed}")
        answers.append(answer)
    return answers, right


def _ask(server: Server, prompt: str, tokens: int, to_the_end: bool) -> Answer:
    """Stream one chat answer to the terminal; `to_the_end` of `tokens`, whatever the model says."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    begun = time.monotonic()
    first = None
    text, cached = "", 0
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": to_the_end},
    )
    for chunk in stream:
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        for choice in chunk.choices:
            extra = {**(chunk.model_extra or {}), **(choice.model_extra or {})}
            prompt_ids = extra.get("prompt_token_ids") or prompt_ids
            token_ids += extra.get("token_ids") or []
            if choice.delta.content:
                first = first or time.monotonic()
                text += choice.delta.content
                print(choice.delta.content, end="", flush=True)
    ended = time.monotonic()
    return Answer(text, prompt_ids, token_ids, cached, (first or ended) - begun, ended - begun)


def _allocated_blocks(server: Server) -> int:
    """How many cache blocks the engine allocated, from its metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.search(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="(\d+)"', text)
    return int(found.group(1)) if found else 0


def _print_memory(model: Path, dtype: str, blocks: int) -> bool:
    """State and cache bytes from layout.py; False if its plan is not what the engine allocated."""
    model_sizes = ModelSizes.from_config(json.loads((model / "config.json").read_text()))
    plan = layout.cache_layout(model_sizes, activation_dtype=dtype, kv_bytes=KV_BYTES)
    print(
        f"\nKDA state {plan.kda_state_bytes_per_sequence / 2**20:.2f} MiB a sequence, whatever its length; "
        f"MLA cache {plan.mla_bytes_per_token} bytes a token"
    )
    print(f"Cache blocks of {plan.block_tokens} tokens: {plan.num_blocks} planned, {blocks} allocated")
    return plan.num_blocks == blocks


def _agrees(model: Path, answer: Answer, exactly: bool) -> bool:
    """Whether the transformers reference in fp32, step by step, takes the answer's tokens; `exactly` all of them."""
    with _step("Asking the transformers reference in fp32"):
        score = _score(model, answer)
    tokens = len(answer.token_ids)
    agreeing = sum(a == b for a, b in zip(score.argmax, score.answer, strict=True))
    print(f"{agreeing} of {tokens} tokens of the first answer agree with the transformers reference")
    if exactly:
        return agreeing == tokens
    wrong = score.clearly_wrong()
    print(f"{wrong} differ where the reference's choice leads by more than {score.clear_lead}, beyond rounding in bf16")
    return not wrong and agreeing > tokens / 2


def _score(model: Path, answer: Answer) -> "Score":
    """What the reference says of the answer."""
    from kimi_demo.reference import HfReference

    return HfReference(model).score(answer.prompt_ids, answer.token_ids)


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
