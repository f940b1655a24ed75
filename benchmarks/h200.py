"""The whole server on one GPU, up to a million tokens of context: ours, vLLM's own implementation, and all attention.

    python -m benchmarks.h200 --out docs/benchmarks/h200.md

serves the 48B's config (config_48b.json beside this file) with random weights once for each run of RUNS, sends the
rows of the run, and writes the table anew after each row. Runs named with --only are run, or run again; the others'
figures are kept in --results. Random weights route tokens about evenly, which is the worst case for weight traffic.
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Load, percentile, steady_tpot
from vllm_kimi_linear import memory
from vllm_kimi_linear.config import Geometry
from vllm_kimi_linear.launch import Server

CONFIG = Path(__file__).with_name("config_48b.json")
BANDWIDTH = 4.8e12  # bytes a second, the H200's data sheet
MILLION = 1_048_000
DUMMY = "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details"
FLAGS = (
    "--dtype=bfloat16 --max-model-len=1048576 --max-num-batched-tokens=16384 --max-num-seqs=256 "
    "--gpu-memory-utilization=0.94 --enable-prefix-caching"
)
K = 1024


@dataclass(frozen=True)
class Run:
    """One server: which implementation, of how many layers, with which rows."""

    rows: tuple[str, ...]
    layers: int = 27
    attention_only: bool = False
    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


# vLLM's own needs CuTe DSL for its fused GEMM and all-reduce, which one GPU does not use.
OWN = (("VLLM_PLUGINS", ""), ("VLLM_KIMI_K3_GEMM_AR", "0"))
SHORT = ("ttft 8K", "tpot 1 4K", "tpot 8 4K", "tpot 32 4K", "poisson")
LONG = ("ttft 128K", "tpot 1 128K", "tpot 8 128K")
RUNS = {
    "ours": Run((*SHORT, *LONG, "million")),
    "vLLM": Run((*SHORT, *LONG, "million"), env=OWN),
    "ours, 4 layers": Run(("tpot 32 128K", "million"), layers=4),
    "vLLM, 4 layers": Run(("tpot 32 128K", "million"), layers=4, env=OWN),
    "attention only, 4 layers": Run(("million",), layers=4, attention_only=True),
    "vLLM, attention only, 4 layers": Run(("million",), layers=4, attention_only=True, env=OWN),
    "ours, bf16 state": Run(("tpot 8 4K", "tpot 32 4K"), flags=("--mamba-ssm-cache-dtype=bfloat16",)),
}


def model_config(run: Run, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the layers of the run."""
    linear = dict(base["linear_attn_config"])
    full = [n for n in linear["full_attn_layers"] if n <= run.layers]
    if run.attention_only:
        full = list(range(1, run.layers + 1))
    linear["full_attn_layers"] = full
    linear["kda_layers"] = [n for n in range(1, run.layers + 1) if n not in full]
    return base | {"num_hidden_layers": run.layers, "linear_attn_config": linear}


def tokens_of(size: str) -> int:
    return int(size.removesuffix("K")) * K


class Rows:
    """The rows' measurements; `scale` divides all lengths, for a trial on a small machine."""

    def __init__(self, load: Load, scale: int) -> None:
        self.load, self.scale = load, scale

    def measure(self, row: str) -> dict[str, float]:
        kind, *rest = row.split()
        measures: dict[str, Callable[..., dict[str, float]]] = {
            "ttft": self.ttft,
            "tpot": self.tpot,
            "poisson": self.poisson,
            "million": self.million,
        }
        return measures[kind](*rest)

    def prompt(self, length: int) -> list[int]:
        return self.load.prompt(max(length // self.scale, 1))

    def ttft(self, size: str) -> dict[str, float]:
        """Seconds to the first token of one prompt: the median of three, or one of a long prompt after a short one."""
        length = tokens_of(size)
        self.load.at_once([self.prompt(length if length < 64 * K else 8 * K)], 2)
        repeats = 3 if length < 64 * K else 1
        return {
            "ttft": statistics.median(
                self.load.at_once([self.prompt(length)], 1)[0].ttft for _ in range(repeats)
            )
        }

    def tpot(self, sequences: str, size: str) -> dict[str, float]:
        """Seconds a token while all sequences decode."""
        prompts = [self.prompt(tokens_of(size)) for _ in range(int(sequences))]
        return {"tpot": steady_tpot(self.load.at_once(prompts, 128))}

    def poisson(self) -> dict[str, float]:
        """256 requests of 2K tokens in and 256 out, arriving at random, 8 a second: prefill and decode overlap."""
        prompts = [self.prompt(2 * K) for _ in range(max(256 // self.scale, 8))]
        begun = time.perf_counter()
        replies = self.load.poisson(prompts, 256, rate=8)
        seconds = time.perf_counter() - begun
        return {
            "tokens a second": sum(len(reply.tokens) for reply in replies) / seconds,
            "p99 tpot": percentile([reply.tpot for reply in replies], 0.99),
            "p50 tpot": percentile([reply.tpot for reply in replies], 0.5),
            "p50 ttft": percentile([reply.ttft for reply in replies], 0.5),
        }

    def million(self) -> dict[str, float]:
        """One prompt of 1,048,000 tokens, 64 tokens of answer, and a second question on the same document."""
        document = self.prompt(MILLION)
        (first,) = self.load.at_once([document], 64)
        (second,) = self.load.at_once([document[:-16] + self.load.prompt(64)], 8)
        return {
            "ttft": first.ttft,
            "tpot": first.tpot,
            "second ttft": second.ttft,
            "second cached": second.cached,
            "prompt": len(document),
        }


def tpot_floor(geometry: Geometry, sequences: int, context: int) -> float:
    """Seconds a token if each step only read its weights, latents and states, and wrote the states, at BANDWIDTH."""
    share = geometry.experts_per_token / geometry.num_experts
    touched = 1 - (1 - share) ** sequences
    weights = sum(
        math.prod(w.shape) * 2 * (touched if ".experts." in w.name else 1)
        for w in memory.weights(geometry)
        if "embed_tokens" not in w.name
    )
    plan = memory.plan(geometry, activation_dtype="bfloat16", kv_bytes=1 << 30)
    state = 2 * plan.kda_state_bytes_per_sequence
    return (weights + sequences * (plan.mla_bytes_per_token * context + state)) / BANDWIDTH


def serve(name: str, run: Run, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Start the run's server and measure its rows into `results`, saved after each."""
    base = json.loads(CONFIG.read_text() if args.config is None else args.config.read_text())
    config = model_config(run if args.config is None else Run(run.rows, base["num_hidden_layers"]), base)
    flags = [*DUMMY.split(), *args.flags.split(), *run.flags]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        log = args.results / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        server = Server(folder, flags, log_path=log, env=dict(run.env))
        begun = time.perf_counter()
        with_start = server.start(timeout=600)
        rows_kept: dict[str, Any] = {}
        results[name] = {"start": time.perf_counter() - begun, "flags": " ".join(flags), "rows": rows_kept}
        try:
            rows = Rows(Load(with_start.url, server.model, config["vocab_size"]), args.scale)
            for row in run.rows:
                if args.rows and row not in args.rows:
                    continue
                try:
                    rows_kept[row] = rows.measure(row)
                except (RuntimeError, OSError) as error:
                    rows_kept[row] = {"error": " ".join(str(error).split())[:300]}
                print(name, row, rows_kept[row], flush=True)
                save(args, results)
        finally:
            server.stop()


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    (args.results / "h200.json").write_text(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(table(results))


def table(results: dict[str, Any]) -> str:
    lines = ["# The whole server on one GPU", "", "    python -m benchmarks.h200 --out docs/benchmarks/h200.md", ""]
    lines += [
        f"{results.get('machine', '')}. Random weights (they route about evenly, the worst case for weight traffic). "
        "ms; the floor counts weights, latents and states at 4.8 TB/s. Requests of one row have different prompts.",
        "",
        "| row | " + " | ".join(name for name in RUNS if name in results) + " | floor |",
        "| --- " * (len([name for name in RUNS if name in results]) + 2) + "|",
    ]
    shown = [name for name in RUNS if name in results]
    whole = Geometry.from_config(model_config(Run(()), json.loads(CONFIG.read_text())))
    for row in dict.fromkeys(row for run in RUNS.values() for row in run.rows):
        figures = dict.fromkeys(key for name in shown for key in results[name]["rows"].get(row, {}))
        for figure in figures:
            cells = [_cell(figure, results[name]["rows"].get(row, {}).get(figure)) for name in shown]
            floor = ""
            if figure == "tpot":
                sequences, context = (1, MILLION) if row == "million" else _sizes(row)
                floor = f"{tpot_floor(whole, sequences, context) * 1e3:.2f}"
            lines.append(f"| {row}: {figure} | " + " | ".join(cells) + f" | {floor} |")
    lines += ["", "| server | started in | flags |", "| --- | --- | --- |"]
    lines += [f"| {name} | {results[name]['start']:.0f} s | `{results[name]['flags']}` |" for name in shown]
    return "\n".join(lines) + "\n"


def _sizes(row: str) -> tuple[int, int]:
    _, sequences, size = row.split()
    return int(sequences), tokens_of(size)


def _cell(figure: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value * 1e3:.2f}" if "ttft" in figure or "tpot" in figure else f"{value:.0f}"


def machine() -> str:
    """The GPU and the versions that matter."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "no GPU"
    names = ("vllm", "torch", "triton")
    return ", ".join([gpu, *(f"{name} {importlib.metadata.version(name)}" for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--results", type=Path, default=Path(".demo/h200"), help="where figures and logs are kept")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], help="the runs to run now")
    parser.add_argument("--rows", nargs="+", help="of their rows, only these")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths, for a trial")
    parser.add_argument("--config", type=Path, help="another config.json, for a trial")
    parser.add_argument("--flags", default=FLAGS, help="of every server, in one string")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    kept = args.results / "h200.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    results["machine"] = machine()
    for name in args.only:
        try:
            serve(name, RUNS[name], args, results)
        except RuntimeError as error:  # a server that does not start must not cost the other runs
            print(f"{name}: {error}", flush=True)
        save(args, results)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
