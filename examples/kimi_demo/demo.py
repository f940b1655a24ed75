"""The demo: serve the small trained model, have it read a log and answer questions, check all that it says.

Where that model is not at hand, as in an installed wheel, a random checkpoint answers one question. On a CPU the server
runs in fp32, and every token must be the reference's. On a GPU, where vLLM's latent attention has no fp32, it runs in
bf16: most tokens must be, and all whose lead over the second best is larger than bf16 can overturn.
"""

import contextlib
import json
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from kimi_demo.agreement import agrees
from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.open_page import PageError, keep_open
from kimi_demo.server import ONE_PROCESS, Server, StartError
from kimi_demo.start_bar import StartBar
from kimi_demo.subject import TRAINED, Subject, trained
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

KV_BYTES = 256 << 20
FLAGS = (
    "--max-model-len=32768",
    f"--kv-cache-memory-bytes={KV_BYTES}",
    "--gpu-memory-utilization=0.1",  # on a GPU so much must be free, however large the cache
    "--enable-prompt-tokens-details",
    "--enable-force-include-usage",  # for the gateway
)
PATIENCE = 900.0  # seconds: a start beside much other work takes minutes
PROMPT = "What do you remember of a very long document?"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT


def run(folder: Path, prompt: str | None, tokens: int, check: bool = False, once: bool = False) -> int:
    """Print the whole demo; returns 0 only if answers are right, tokens the reference's, and the plan holds.

    On a terminal, but for `once`, the server and the page then stay open until Ctrl-C. `check` asks transformers
    though its answers are kept.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    folder.mkdir(parents=True, exist_ok=True)
    with _ends_like_ctrl_c():
        try:
            subject = _subject(folder, prompt)
            dtype = "bfloat16" if _has_gpu() else "float32"
            flags = FLAGS if dtype == "bfloat16" else (*FLAGS, ONE_PROCESS)
            server = Server(subject.model, (f"--dtype={dtype}", *flags), log_path=folder / "server.log")
            with _stopped_at_the_end(server):
                fine = _ask_and_check(server, subject, tokens, dtype, check)
                if fine and at_terminal and not once:
                    with contextlib.suppress(KeyboardInterrupt):
                        keep_open(server, subject, folder)
            return 0 if fine else 1
        except (StartError, PageError) as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nStopped before all was checked.", file=sys.stderr)
            return INTERRUPTED


def _ask_and_check(server: Server, subject: Subject, tokens: int, dtype: str, check: bool) -> bool:
    """Start the server, ask, compare; returns whether all is right. Raises StartError."""
    print(f"Starting vllm serve {subject.model}, with its log in {server.log_path}", flush=True)
    server.launch()
    bar = StartBar(lambda: server.log, sys.stdout.isatty())
    bar(0.0)
    from kimi_demo.conversation import converse  # takes seconds, in which the server starts

    server.wait(PATIENCE, waiting=bar)
    bar.ready(time.monotonic() - server.launched)
    answers, right = converse(server, subject, tokens)
    planned = _print_memory(subject.model, dtype, _allocated_blocks(server))
    agreed = agrees(subject.model, answers, tokens, exactly=dtype == "float32", check=check)
    return right and planned and agreed


@contextlib.contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Within, each signal that ends a program raises KeyboardInterrupt, so that nothing started here stays."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in ENDING}
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: dict) -> None:
    for each, handler in handlers.items():
        signal.signal(each, handler)


@contextlib.contextmanager
def _stopped_at_the_end(server: Server) -> Iterator[None]:
    """Stops the server whatever happens within; another Ctrl-C does not break that off."""
    try:
        yield
    finally:
        before = {each: signal.signal(each, signal.SIG_IGN) for each in ENDING}
        try:
            server.stop()
        finally:
            _restore(before)


def _subject(folder: Path, prompt: str | None) -> Subject:
    """The trained model and its log; the random one if it is not at hand, or to answer a prompt of one's own."""
    if prompt is None and (found := trained(TRAINED)):
        return found
    model = folder / "model"
    print(f"Writing a small checkpoint with random weights, which writes nonsense, to {model}", flush=True)
    write_checkpoint(model)
    return Subject(model, "", [(prompt or PROMPT, None)])


def _has_gpu() -> bool:
    """Whether torch sees one; its CPU build, whose import takes seconds, is not asked."""
    if metadata.version("torch").endswith("+cpu"):
        return False
    import torch

    return torch.cuda.is_available()


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
