"""Prefixes that the cache cannot hold or that a server forgets: asked again without and with a place to keep them.

    python -m benchmarks.offloading --out docs/benchmarks/offloading.md

serves the 48B's config with random weights and a cache that holds --held sessions of --tokens tokens. First a prompt of
a million tokens is asked (--million 0: not), then --sessions others, each with a question, which evict it and one
another; then all of them once more. With a folder it is the server's restart that comes between. A trial on a CPU:
--config CONFIG --flags FLAGS --settings JSON, further settings of vLLM's connector.
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
from vllm.platforms import current_platform

from benchmarks.common import CONFIG, GIB, MILLION, gpus, versions
from benchmarks.h200.runs import ENV
from benchmarks.load import Load, Reply, percentile
from kimi_demo.server import Server
from vllm_kimi_linear.cache import layout, policy
from vllm_kimi_linear.config.model import ModelSizes

FLAGS = "--dtype=bfloat16 --max-num-batched-tokens=16384 --max-num-seqs=64"
COMMON = "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details --enable-prefix-caching"
WAYS = ("no offloading", "host memory", "a folder")
PREFIXES = "prefixes"  # the folder's name, beside the model's config
QUESTION = 64  # tokens of a question about a session
SPARE_BLOCKS = 64
SHUTDOWN = 60  # seconds in which what is being stored is stored


def planned(plan: layout.CacheLayout, tokens: int, pool: int, chunk: int) -> int:
    """Bytes of a rank that a prompt leaves to be offloaded, alone in a pool of so many blocks and read in chunks.

    Whole blocks of latents, and the states that are kept: those that the pool affords when their chunk begins.
    """
    block, states = plan.block_tokens, set[int]()
    kept = policy.kept_boundaries(tokens // block) | {(tokens - 1) // block}
    for start in range(0, tokens, chunk):
        end, free = min(start + chunk, tokens), pool - 1 - start // block  # one block is vLLM's own
        free -= policy.own_blocks(start, end, block, plan.kda_groups)
        affordable = policy.affordable_columns(free, plan.kda_groups)
        states.update(policy.columns_to_keep(start, end, block, kept, affordable))
        if end % block == 0 and end // block in kept:
            states.add(end // block - 1)
    return (tokens // block + len(states) * plan.kda_groups) * plan.block_bytes


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


class Asked:
    """The rows of one way; prompts are asked one after the other, each with a new question behind it."""

    def __init__(self, name: str, load: Load) -> None:
        self.name, self.load = name, load
        self.rows: list[str] = []

    def warm_up(self, args: argparse.Namespace) -> None:
        """What the first prompts of a server cost is nobody's figure."""
        self.load.at_once([self.load.prompt(4096 if args.million else 64)] * 2, 4)

    def ask(self, server: Server, what: str, prompts: Sequence[list[int]]) -> None:
        names = ("vllm:kv_offload_store_bytes", "vllm:kv_offload_load_bytes")
        before = [metric(server, each) for each in names]
        begun = time.perf_counter()
        replies = [self.load.at_once([prompt + self.load.prompt(QUESTION)], 8)[0] for prompt in prompts]
        seconds = time.perf_counter() - begun
        time.sleep(1)  # what is stored of the last one
        moved = [metric(server, each) - then for each, then in zip(names, before, strict=True)]
        self.rows.append(row(f"{self.name}: {what}", replies, len(prompts[0]), seconds, moved))


def evicted(server: Server, asked: Asked, args: argparse.Namespace) -> None:
    """A row for the first time, one for the second, and two for a million tokens."""
    sessions = [asked.load.prompt(args.tokens) for _ in range(args.sessions)]
    document = asked.load.prompt(args.million) if args.million else []
    if document:
        asked.ask(server, f"{args.million:,} tokens, first", [document])
    asked.ask(server, "sessions, first", sessions)
    if document:
        asked.ask(server, f"{args.million:,} tokens, evicted", [document])
    asked.ask(server, "sessions, again", sessions)


def written(folder: Path) -> int:
    """Bytes in a folder once nothing is being written to it."""
    before, now = -1, 0
    while before != now:
        time.sleep(2)
        before, now = now, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return now


def restarted(server: Server, asked: Asked, args: argparse.Namespace) -> None:
    """Two rows: before the restart and after it."""
    document = asked.load.prompt(args.million or args.tokens)
    asked.ask(server, f"{len(document):,} tokens, first", [document])
    begun = time.perf_counter()
    size = written(Path(server.model) / PREFIXES)
    print(f"{size / GIB:.2f} GiB of files, written at most {time.perf_counter() - begun:.0f} s later", flush=True)
    server.stop(SHUTDOWN)
    server.start(600)
    asked.warm_up(args)
    asked.ask(server, f"{len(document):,} tokens, after a restart", [document])


def kept_in(way: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The flags of a way."""
    if way == "no offloading":
        return []
    tiers = [{"type": "fs", "root_dir": str(folder / PREFIXES)}] if way == "a folder" else []
    settings = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": int(args.host * GIB),
        "secondary_tiers": tiers,
        **args.settings,
    }
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    return [f"--kv-transfer-config={json.dumps(connector)}", f"--shutdown-timeout={SHUTDOWN}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--held", type=int, default=50, help="sessions that the GPU's cache holds")
    parser.add_argument("--million", type=int, default=MILLION, help="tokens of the long prompt; 0: none")
    parser.add_argument("--host", type=float, default=64, help="GiB of the host's memory")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    config: dict[str, Any] = json.loads(args.config.read_text())
    dtype = "float32" if "float32" in args.flags else "bfloat16"
    model_sizes = ModelSizes.from_config(config)
    device = current_platform.device_type
    plan = layout.cache_layout(
        model_sizes, activation_dtype=dtype, kv_bytes=0, device=device, prefix_caching=True, tensor_parallel=args.gpus
    )
    longest = max(args.million, args.tokens) + 2 * QUESTION
    held = max(args.held * plan.bytes_per_sequence(args.tokens), plan.bytes_per_sequence(longest))
    pool = held // plan.block_bytes + SPARE_BLOCKS
    chunk = int(re.findall(r"--max-num-batched-tokens=(\d+)", args.flags)[0])
    sizes = [planned(plan, tokens + QUESTION, pool, chunk) for tokens in (args.tokens, args.million)]
    rows = []
    for way in args.ways:
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            (folder / "config.json").write_text(json.dumps(config))
            flags = [*COMMON.split(), *args.flags.split(), f"--kv-cache-memory-bytes={pool * plan.block_bytes}"]
            flags += [f"--max-model-len={longest}", f"--tensor-parallel-size={args.gpus}", *kept_in(way, folder, args)]
            with Server(folder, flags, log_path=folder / "server.log", env=dict(ENV)) as server:
                asked = Asked(way, Load(server.url, server.model, config["vocab_size"]))
                asked.warm_up(args)
                (restarted if way == "a folder" else evicted)(server, asked, args)
            rows += asked.rows
        if args.out:
            args.out.write_text(table(rows, args, sizes))


def table(rows: Sequence[str], args: argparse.Namespace, sizes: Sequence[int]) -> str:
    session, million = (f"{size / GIB:.3f}" for size in sizes)
    return "\n".join(
        [
            "# Prefixes that leave the cache",
            "",
            "    python -m benchmarks.offloading "
            f"--sessions {args.sessions} --tokens {args.tokens} --held {args.held} --million {args.million} "
            f"--host {args.host:g} --gpus {args.gpus}",
            "",
            f"{gpus()}, {versions('vllm', 'torch', 'triton')}; the 48B's config with random weights, a cache that",
            f"holds {args.held} of the sessions. One request after the other, with questions of {QUESTION} tokens.",
            f"Planned: {session} GiB a rank for a session, {million} for the long prompt.",
            "",
            "| what | tokens found | median TTFT, s | p99 TTFT, s | tokens/s | GiB stored | GiB loaded |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
