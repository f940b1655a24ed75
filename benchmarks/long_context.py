"""How the time and the memory of a prompt grow with its length on a CPU, on the demo checkpoint.

    python -m benchmarks.long_context --out docs/benchmarks/long-context.md

One server with a context of a million tokens, and prompts of growing length, one after another, each answered with one
token. By the arithmetic of the model time is a n + b n^2: everything grows with n but the attention of the MLA layers.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy
import psutil

from benchmarks.common import GIB, MIB, K
from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.server import Server
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

CACHE = 5 * GIB
FLAGS = (
    "--dtype=float32",
    "--max-model-len=1048576",
    f"--kv-cache-memory-bytes={CACHE}",
    "--max-num-batched-tokens=2048",
    "--no-enable-prefix-caching",
)


def resident(server: Server) -> int:
    """Bytes that the server's processes hold in memory of their own."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])


def seconds(server: Server, length: int) -> float:
    """From sending a prompt of so many tokens to the end of its answer of one."""
    prompt = [(length + 7919 * i) % 1000 for i in range(length)]
    body = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    begun = time.perf_counter()
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=3600, trust_env=False)
    reply.raise_for_status()
    return time.perf_counter() - begun


def report(rows: list[tuple[int, float, int]], model_sizes: ModelSizes) -> str:
    lengths, times = (numpy.array(column, dtype=float) for column in list(zip(*rows, strict=True))[:2])
    # Relative errors count, so that a short prompt weighs as much as a long one.
    terms = numpy.stack([lengths, lengths**2], axis=1) / times[:, None]
    (linear, square), *_ = numpy.linalg.lstsq(terms, numpy.ones(len(rows)), rcond=None)
    plan = layout.cache_layout(model_sizes, activation_dtype="float32", kv_bytes=CACHE)
    lines = [
        "# A long prompt on a CPU",
        "",
        "    python -m benchmarks.long_context --out docs/benchmarks/long-context.md",
        "",
        f"{platform.machine()}, {psutil.cpu_count()} cores, the demo checkpoint in fp32, `{' '.join(FLAGS)}`. Fitted:",
        f"seconds = {linear:.3e} n + {square:.3e} n^2. vLLM holds the whole cache from the start: beyond it is what",
        "its processes hold more than after a short prompt; planned is the part of the cache that the prompt takes.",
        "",
        "| tokens | seconds | fitted | tokens/s | beyond the cache, MiB | planned, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for length, spent, grown in rows:
        fitted = linear * length + square * length**2
        planned = plan.bytes_per_sequence(length) / MIB
        cells = (f"{length:,}", f"{spent:.1f}", f"{fitted:.1f}", f"{length / spent:.0f}", f"{grown / MIB:.0f}")
        lines.append(f"| {' | '.join(cells)} | {planned:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K])
    args = parser.parse_args(argv)
    rows: list[tuple[int, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_checkpoint(model)
        model_sizes = ModelSizes.from_config(json.loads((model / "config.json").read_text()))
        with Server(model, FLAGS, log_path=Path(folder) / "server.log") as server:
            seconds(server, K)
            before = resident(server)
            for length in args.lengths:
                rows.append((length, seconds(server, length), resident(server) - before))
                table = report(rows, model_sizes) if len(rows) > 1 else ""
                print(rows[-1], flush=True)
                if args.out and table:
                    args.out.write_text(table)


if __name__ == "__main__":
    main()
