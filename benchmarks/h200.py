"""The whole server on one GPU, up to a million tokens of context: ours, vLLM's own implementation, and all attention.

    python -m benchmarks.h200 --out docs/benchmarks/h200.md

serves the 48B's config (config_48b.json beside this file) with random weights once for each run of RUNS, sends the
rows of the run, the most telling first, and keeps every figure as it comes: in --results, and in the table. Begun
again it goes on with what is missing or failed. No row and no start takes longer than its limit, and after --seconds
none is begun. A smaller GPU takes --layers, all else alike, or --gpus shares the model out. vLLM simulates an even
choice of experts: with the weights that its dummy loader makes up nearly all tokens would choose the same ones, for
the logits come out near 1e-6 and the routers' biases near 1e-3.
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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import trace
from benchmarks.load import Load, late_tpot, percentile, steady_tpot
from kimi_demo.server import Server
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes

CONFIG = Path(__file__).with_name("config_48b.json")
PAGE = Path("docs/benchmarks/h200.md")
LAYERS = 27
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, by the data sheets
MILLION = 1_048_000
DUMMY = "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details"
# Few graphs, for they are most of a start; the sizes of the rows, and what random arrivals are rounded up to.
FLAGS = (
    "--dtype=bfloat16 --max-model-len=1048576 --max-num-batched-tokens=16384 --max-num-seqs=128 "
    "--gpu-memory-utilization=0.94 --enable-prefix-caching --cudagraph-capture-sizes 1 2 4 8 16 32 48 64 128"
)
ROUTING = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
# Nothing is compiled for the sampler, graphs are captured once, not also to weigh them, and tokens part among experts.
ENV = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    ROUTING: "uniform_random",
}
START_LIMIT, ROW_LIMIT, MILLION_LIMIT = 300, 240, 420  # seconds
K = 1024


@dataclass(frozen=True)
class Run:
    """One server: which implementation, with which rows."""

    rows: tuple[str, ...]
    attention_only: bool = False
    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


# vLLM's own needs CuTe DSL for its fused GEMM and all-reduce, which one GPU does not use.
OWN = (("VLLM_PLUGINS", ""), ("VLLM_KIMI_K3_GEMM_AR", "0"))
ALONE = ("tpot 1 4K", "ttft 8K", "tpot 1 128K")
# Blocks as long as ours; and a context that need not be computed, where a request says so.
FILLED = {"kv_transfer_params": {"filled": True}}
IMPORTS = (("PYTHONPATH", os.pathsep.join(filter(None, [str(CONFIG.parents[1]), os.environ.get("PYTHONPATH")]))),)
FILLING = '{"kv_connector":"FilledConnector","kv_connector_module_path":"benchmarks.filled","kv_role":"kv_both"}'
ATTENTION = ("--block-size=256", "--no-enable-prefix-caching", f"--kv-transfer-config={FILLING}")
FILLED_MILLION = "tpot 1 1M filled"  # to prefill it with attention alone takes longer than all else
MANY = ("tpot 8 4K", "tpot 32 4K", "poisson", "tpot 8 128K")
RUNS = {
    "ours": Run((*ALONE, "million", *MANY, "ttft 512K")),
    "vLLM": Run((*ALONE, *MANY, "million"), env=OWN),
    "attention only": Run((*ALONE, FILLED_MILLION, "ttft 512K", *MANY), True, ATTENTION, IMPORTS),
    "ours, bf16 state": Run(("tpot 1 4K", "tpot 8 4K", "tpot 32 4K"), flags=("--mamba-ssm-cache-dtype=bfloat16",)),
}


def model_config(run: Run, base: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    """`base` with its first `layers` layers, of the run's kind."""
    linear = dict(base["linear_attn_config"])
    full = [n for n in linear["full_attn_layers"] if n <= layers]
    if run.attention_only:
        full = list(range(1, layers + 1))
    linear["full_attn_layers"] = full
    linear["kda_layers"] = [n for n in range(1, layers + 1) if n not in full]
    return base | {"num_hidden_layers": layers, "linear_attn_config": linear}


def tokens_of(size: str) -> int:
    return MILLION if size == "1M" else int(size.removesuffix("K")) * K


class Rows:
    """The rows' measurements; `scale` divides all lengths, for a trial on a small machine."""

    def __init__(self, load: Load, scale: int) -> None:
        self.load, self.scale = load, scale

    def warm_up(self) -> None:
        """What the first prompts and the first graphs cost is nobody's figure."""
        self.load.limit = START_LIMIT
        self.load.at_once([self.prompt(8 * K)] * 2, 4)

    def measure(self, row: str) -> dict[str, float]:
        self.load.limit = MILLION_LIMIT if row == "million" else ROW_LIMIT
        self.load.random.seed(row)  # the same prompts and arrivals for every server, whatever rows it had before
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
        """Seconds to the first token of one prompt; of a short one the median of three."""
        prompts = [self.prompt(tokens_of(size)) for _ in range(3 if tokens_of(size) < 256 * K else 1)]
        return {"ttft": statistics.median(self.load.at_once([prompt], 1)[0].ttft for prompt in prompts)}

    def tpot(self, sequences: str, size: str, filled: str = "") -> dict[str, float]:
        """Seconds a token while all sequences decode, and of one alone, unless it was filled, also to the first."""
        self.load.extra = FILLED if filled else {}
        replies = self.load.at_once([self.prompt(tokens_of(size)) for _ in range(int(sequences))], 128)
        self.load.extra = {}
        alone = {"ttft": replies[0].ttft} if len(replies) == 1 and not filled else {}
        gaps = [b - a for reply in replies for a, b in pairwise(reply.times)]
        return {"tpot": steady_tpot(replies), "p50 gap": statistics.median(gaps), "most gap": max(gaps), **alone}

    def poisson(self) -> dict[str, float]:
        """256 requests of 2K tokens in and 256 out, arriving at random, 16 a second: prefill and decode overlap."""
        prompts = [self.prompt(2 * K) for _ in range(max(256 // self.scale, 8))]
        begun = time.perf_counter()
        replies = self.load.poisson(prompts, 256, rate=16)
        seconds = time.perf_counter() - begun
        return {
            "tokens a second": sum(len(reply.tokens) for reply in replies) / seconds,
            "p99 tpot": percentile([reply.tpot for reply in replies], 0.99),
            "p50 tpot": percentile([reply.tpot for reply in replies], 0.5),
            "p50 ttft": percentile([reply.ttft for reply in replies], 0.5),
        }

    def million(self) -> dict[str, float]:
        """One prompt of 1,048,000 tokens, 256 tokens of answer, and a second question on the same document."""
        document = self.prompt(MILLION)
        (first,) = self.load.at_once([document], 256)
        (second,) = self.load.at_once([document[:-16] + self.load.prompt(64)], 8)
        return {
            "ttft": first.ttft,
            "tpot": late_tpot(first),
            "second ttft": second.ttft,
            "second cached": second.cached,
            "prompt": len(document),
        }


def tpot_floor(
    model_sizes: ModelSizes, sequences: int, context: int, bandwidth: float = BANDWIDTHS["H200"], gpus: int = 1
) -> float:
    """Seconds a token if each step only read its weights, latents and states, and wrote the states.

    Several GPUs share weights and states; each reads all latents.
    """
    share = model_sizes.experts_per_token / model_sizes.num_experts
    touched = 1 - (1 - share) ** sequences
    weights = sum(
        math.prod(w.shape) * 2 * (touched if ".experts." in w.name else 1)
        for w in tensors.weights(model_sizes)
        if "embed_tokens" not in w.name
    )
    plan = layout.cache_layout(model_sizes, activation_dtype="bfloat16", kv_bytes=0)
    state = 2 * plan.kda_state_bytes_per_sequence
    return ((weights + sequences * state) / gpus + sequences * plan.mla_bytes_per_token * context) / bandwidth


class Results:
    """The figures of all runs at one depth on so many GPUs, kept in a file and shown in a table."""

    def __init__(self, folder: Path, layers: int, gpus: int, out: Path | None, note: str = "") -> None:
        self.file, self.layers, self.gpus = folder / f"{layers}-layers-{gpus}.json", layers, gpus
        self.out, self.note = out, note
        self.runs: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def missing(self, name: str, rows: list[str]) -> list[str]:
        measured = self.runs.get(name, {}).get("rows", {})
        return [row for row in rows if "error" in measured.get(row, {"error": "not run"})]

    def started(self, name: str, seconds: float, flags: str) -> None:
        run = self.runs.setdefault(name, {"rows": {}})
        run |= {"start": seconds, "flags": flags, "machine": machine()}
        self.save()

    def add(self, name: str, row: str, figures: dict[str, Any]) -> None:
        print(name, row, figures, flush=True)
        self.runs[name]["rows"][row] = figures
        self.save()

    def save(self) -> None:
        self.file.write_text(json.dumps(self.runs, indent=1))
        if self.out:
            self.out.write_text(table(self.runs, self.layers, self.gpus, self.note, self.out))


def serve(name: str, args: argparse.Namespace, results: Results, deadline: float) -> None:
    """Start the run's server, unless nothing of it is missing, and measure its rows."""
    run = RUNS[name]
    rows = results.missing(name, [row for row in run.rows if not args.rows or row in args.rows])
    if not rows:
        return
    base = json.loads((args.config or CONFIG).read_text())
    config = base if args.config else model_config(run, base, args.layers)
    flags = [*DUMMY.split(), *args.flags.split(), *run.flags, f"--tensor-parallel-size={args.gpus}"]
    stem = f"{args.layers}-{args.gpus}-{name.replace(', ', '-').replace(' ', '-')}"
    tracing = [trace.flag(args.results / stem)] if args.trace else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        server = Server(folder, [*flags, *tracing], log_path=args.results / f"{stem}.log", env=ENV | dict(run.env))
        begun = time.perf_counter()
        try:
            server.start(timeout=START_LIMIT)
            results.started(name, time.perf_counter() - begun, " ".join(flags) + " --profiler-config=..." * args.trace)
            measured = Rows(Load(server.url, server.model, config["vocab_size"]), args.scale)
            measured.warm_up()
            for row in rows:
                if time.monotonic() > deadline or (server.process and server.process.poll() is not None):
                    return
                try:
                    results.add(name, row, measured.measure(row))
                except (RuntimeError, ValueError, OSError, httpx.HTTPError) as error:
                    sentence = " ".join(f"{type(error).__name__}: {error}".split())
                    results.add(name, row, {"error": sentence[:300]})
            if args.trace:
                trace.Recorder(measured.load, args.results / stem).all(args.scale)
        finally:
            server.stop()


def table(
    runs: dict[str, dict[str, Any]], layers: int = LAYERS, gpus: int = 1, note: str = "", out: Path = PAGE
) -> str:
    """The page, in Markdown; `out` is its name in the command that makes it."""
    shown = [name for name in RUNS if name in runs]
    machines = " ".join(runs[name]["machine"] for name in shown)
    gpu = next((name for name in BANDWIDTHS if name in machines), "H200")
    lines = [
        f"# The whole server on {'one GPU' if gpus == 1 else f'{gpus} GPUs'}, {layers} layers",
        "",
        f"    python -m benchmarks.h200 --layers {layers} --gpus {gpus} --out {out}",
        "",
        f"{layers} of the 48B's {LAYERS} layers, with random weights. ms; the floor counts latents, states and "
        f"weights, experts as if chosen evenly, of ours at {BANDWIDTHS[gpu] / 1e12} TB/s. "
        "Requests of one row have different prompts.",
        "",
        *([note, ""] if note else []),
    ]
    floors = {"floor": RUNS["ours"]} | {f"floor, {name}": RUNS[name] for name in shown if RUNS[name].attention_only}
    base = json.loads(CONFIG.read_text())
    models = [ModelSizes.from_config(model_config(run, base, layers)) for run in floors.values()]
    lines += ["| row | " + " | ".join([*shown, *floors]) + " |", "| --- " * (1 + len(shown) + len(floors)) + "|"]
    for row in dict.fromkeys(row for run in RUNS.values() for row in run.rows):
        measured = {name: runs[name]["rows"].get(row, {}) for name in shown}
        for figure in dict.fromkeys(key for figures in measured.values() for key in figures):
            cells = [_cell(figure, measured[name].get(figure)) for name in shown]
            if figure == "tpot":
                sequences, context = (1, MILLION) if row == "million" else _sizes(row)
                cells += [_cell("tpot", tpot_floor(m, sequences, context, BANDWIDTHS[gpu], gpus)) for m in models]
            else:
                cells += [""] * len(models)
            lines.append(f"| {row}: {figure} | " + " | ".join(cells) + " |")
    lines += ["", "| server | machine | started in | flags |", "| --- | --- | --- | --- |"]
    for name in shown:
        run = runs[name]
        lines.append(f"| {name} | {run['machine']} | {run['start']:.0f} s | `{run['flags']}` |")
    return "\n".join(lines) + "\n"


def _sizes(row: str) -> tuple[int, int]:
    _, sequences, size, *_ = row.split()
    return int(sequences), tokens_of(size)


def _cell(figure: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value * 1e3:.2f}" if figure.split()[-1] in ("ttft", "tpot", "gap") else f"{value:.0f}"


def machine() -> str:
    """The GPU and the versions that matter."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        gpu = ", ".join(f"{count} x {name}" for name, count in Counter(found).items())
    except (OSError, subprocess.CalledProcessError):
        gpu = "no GPU"
    names = ("vllm", "torch", "triton")
    return ", ".join([gpu, *(f"{name} {importlib.metadata.version(name)}" for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--note", default="", help="what to know of the run, for the table's page")
    parser.add_argument("--results", type=Path, default=Path(".demo/h200"), help="where figures and logs are kept")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], help="the runs to run now")
    parser.add_argument("--rows", nargs="+", help="of their rows, only these")
    parser.add_argument("--layers", type=int, default=LAYERS, help="the first so many layers, for a smaller GPU")
    parser.add_argument("--gpus", type=int, default=1, help="that share each server's model (tensor parallel)")
    parser.add_argument("--trace", action="store_true", help="and record traces, for benchmarks.trace to read")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths, for a trial")
    parser.add_argument("--config", type=Path, help="another config.json, for a trial")
    parser.add_argument("--flags", default=FLAGS, help="of every server, in one string")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    args.results.mkdir(parents=True, exist_ok=True)
    results = Results(args.results, args.layers, args.gpus, args.out, args.note)
    for name in args.only:
        if time.monotonic() > deadline:
            break
        try:
            serve(name, args, results, deadline)
        except (RuntimeError, OSError, httpx.HTTPError) as error:  # a server that fails must not cost the other runs
            print(f"{name}: {error}", flush=True)
    results.save()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
