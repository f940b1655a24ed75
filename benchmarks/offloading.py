"""Prefixes that the cache cannot hold: sessions asked again with and without the host's memory, on one GPU or more.

    python -m benchmarks.offloading --out docs/benchmarks/offloading.md

serves the 48B's config with random weights and a cache that holds --held sessions of --tokens tokens. First a prompt of
a million tokens is asked (--million 0: not), then --sessions others, each with a question, which evict it and one
another; then all of them once more. A trial on a CPU: --config CONFIG --flags FLAGS --connector JSON.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import CONFIG, GIB, MILLION, gpus, versions
from benchmarks.h200.runs import ENV
from benchmarks.load import Load, Reply, percentile
from kimi_demo.server import Server
from vllm_kimi_linear.cache import layout, policy
from vllm_kimi_linear.config.model import ModelSizes

FLAGS = "--dtype=bfloat16 --max-model-len=1048576 --max-num-batched-tokens=16384 --max-num-seqs=64"
COMMON = "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details --enable-prefix-caching"
QUESTION = 64  # tokens of a question about a session


def planned(model_sizes: ModelSizes, plan: layout.CacheLayout, tokens: int) -> int:
    """Bytes of a rank that a prompt of so many tokens leaves to be offloaded: whole blocks of latents, kept states."""
    blocks = tokens // plan.block_tokens
    kept = policy.columns_to_keep(0, tokens, plan.block_tokens, policy.kept_boundaries(blocks) | {blocks}, blocks)
    states = {*kept, blocks - 1} if blocks else set()
    return (blocks + len(states) * plan.kda_groups) * plan.block_bytes


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in re.findall(rf"^{name}_total(?:{{.*}})? .*$", text, re.MULTILINE)
    )


def row(name: str, replies: Sequence[Reply], prompt: int, seconds: float, moved: Sequence[float]) -> str:
    times = [reply.ttft for reply in replies]
    hits = sum(reply.cached for reply in replies) / (prompt * len(replies))
    cells = [
        name,
        f"{hits:.0%}",
        f"{statistics.median(times):.3f}",
        f"{percentile(times, 0.99):.3f}",
        f"{prompt * len(replies) / seconds:,.0f}",
        *(f"{each / GIB:.2f}" for each in moved),
    ]
    print(cells, flush=True)
    return f"| {' | '.join(cells)} |"


def measure(server: Server, load: Load, args: argparse.Namespace, name: str) -> list[str]:
    """A row for the first time, one for the second, and two for a million tokens."""
    sessions = [load.prompt(args.tokens) for _ in range(args.sessions)]
    rows: list[str] = []

    def ask(what: str, prompts: Sequence[list[int]]) -> list[Reply]:
        names = ("vllm:kv_offload_store_bytes", "vllm:kv_offload_load_bytes")
        before = [metric(server, each) for each in names]
        begun = time.perf_counter()
        replies = [load.at_once([prompt + load.prompt(QUESTION)], 8)[0] for prompt in prompts]
        seconds = time.perf_counter() - begun
        time.sleep(1)  # what is stored of the last one
        moved = [metric(server, each) - then for each, then in zip(names, before, strict=True)]
        rows.append(row(f"{name}: {what}", replies, len(prompts[0]), seconds, moved))
        return replies

    document = load.prompt(args.million) if args.million else []
    if document:
        ask(f"{args.million:,} tokens, first", [document])
    ask("sessions, first", sessions)
    if document:
        ask(f"{args.million:,} tokens, evicted", [document])
    ask("sessions, again", sessions)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--held", type=int, default=50, help="sessions that the GPU's cache holds")
    parser.add_argument("--million", type=int, default=MILLION, help="tokens of the long prompt; 0: none")
    parser.add_argument("--host", type=float, default=64, help="GiB of the host's memory")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--connector", help="--kv-transfer-config in place of the host's memory, for a trial")
    args = parser.parse_args()
    config: dict[str, Any] = json.loads(args.config.read_text())
    dtype = "float32" if "float32" in args.flags else "bfloat16"
    model_sizes = ModelSizes.from_config(config)
    device = "cpu" if args.connector else "cuda"
    plan = layout.cache_layout(
        model_sizes, activation_dtype=dtype, kv_bytes=0, device=device, prefix_caching=True, tensor_parallel=args.gpus
    )
    held = max(args.held * plan.bytes_per_sequence(args.tokens), plan.bytes_per_sequence(args.million + 128))
    offloading = f"--kv-transfer-config={args.connector}" if args.connector else f"--kv-offloading-size={args.host}"
    rows = []
    for name, flags in (("no offloading", []), ("host memory", [offloading])):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            flags += [*COMMON.split(), *args.flags.split(), f"--kv-cache-memory-bytes={held + plan.block_bytes}"]
            log = Path(folder) / "server.log"
            server = Server(Path(folder), [*flags, f"--tensor-parallel-size={args.gpus}"], log_path=log, env=dict(ENV))
            with server:
                load = Load(server.url, server.model, config["vocab_size"])
                load.at_once([load.prompt(4096 if args.million else 64)] * 2, 4)  # what the first prompts cost
                rows += measure(server, load, args, name)
        if args.out:
            args.out.write_text(table(rows, args, planned(model_sizes, plan, args.tokens + QUESTION)))


def table(rows: Sequence[str], args: argparse.Namespace, planned_bytes: int) -> str:
    return "\n".join(
        [
            "# Prefixes that leave the cache",
            "",
            "    python -m benchmarks.offloading "
            f"--sessions {args.sessions} --tokens {args.tokens} --held {args.held} --gpus {args.gpus}",
            "",
            f"{gpus()}, {versions('vllm', 'torch', 'triton')}; the 48B's config with random weights, a cache that",
            f"holds {args.held} of the sessions. One request after the other, with questions of {QUESTION} tokens.",
            f"Planned for a session: {planned_bytes / GIB:.3f} GiB a rank.",
            "",
            "| what | tokens found | median TTFT, s | p99 TTFT, s | tokens/s | GiB stored | GiB loaded |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
