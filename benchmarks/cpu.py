"""Speed on a CPU: ours through vLLM's engine against transformers, one run, medians, as shares of the floor.

    python benchmarks/cpu.py [--out docs/benchmarks/cpu.md] [--llama-bench PATH --gguf FILE]

The checkpoint has the layer sizes of the 48B in 4 layers and 16 experts (723 M parameters, random weights);
it is written to --model once. Every engine runs in a process of its own, one after another; run nothing else.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.server import DEFAULT_ENV
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes

PREFILLS = (512, 4096)
DECODES = (1, 16)
DECODE_PROMPT, DECODE_TOKENS = 16, 32
TARGETS = {"prefill 512": 4, "prefill 4096": 6, "decode 1": 3, "decode 16": 10}
BYTES = {"bfloat16": 2, "float32": 4}


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` timings, after one untimed call."""
    call()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def sizes_of(model: Path) -> ModelSizes:
    return ModelSizes.from_config(json.loads((model / "config.json").read_text()))


def token_ids(count: int, vocab: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(32, vocab - 64), k=count)


# Each of the following runs in its own process and returns what it measured.


def measure_floor() -> dict[str, float]:
    """Read bandwidth in GB/s, and GEMM rate in GFLOP/s by dtype."""
    import torch
    from vllm import _custom_ops

    large = torch.ones(1 << 28, dtype=torch.float32)
    result = {"read": large.numel() * 4 / median_seconds(large.sum, 5) / 1e9}
    del large
    size = 2304
    for dtype in BYTES:
        weight = torch.randn(4 * size, size, dtype=getattr(torch, dtype))
        rows = torch.randn(2048, size, dtype=weight.dtype)
        packed = _custom_ops.create_onednn_mm(weight.t(), 1)
        seconds = median_seconds(partial(_custom_ops.onednn_mm, packed, rows, None), 5)
        result[dtype] = 2 * rows.shape[0] * weight.numel() / seconds / 1e9
    return result


def measure_ours(model: Path, dtype: str) -> dict[str, float]:
    """Tokens a second through vLLM's engine."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype=dtype,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    vocab = sizes_of(model).vocab_size
    seeds = iter(range(1 << 30))

    def generate(sequences: int, prompt: int, tokens: int) -> None:
        prompts = [{"prompt_token_ids": token_ids(prompt, vocab, next(seeds))} for _ in range(sequences)]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)

    return measure(generate, repeats=3)


def measure_transformers(model: Path, dtype: str) -> dict[str, float]:
    """Tokens a second of transformers' generate, sequences of equal length in one batch."""
    import torch

    from kimi_demo.reference import HfReference

    reference = HfReference(model, getattr(torch, dtype)).model
    vocab = reference.config.vocab_size
    seeds = iter(range(1 << 30))

    @torch.inference_mode()
    def generate(sequences: int, prompt: int, tokens: int) -> None:
        ids = torch.tensor([token_ids(prompt, vocab, next(seeds)) for _ in range(sequences)])
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )

    return measure(generate, repeats=1)


def measure(generate: Callable[[int, int, int], None], repeats: int) -> dict[str, float]:
    """Prefill: prompt tokens over the time of the first token. Decode: further tokens over their extra time."""
    result = {}
    generate(1, 64, 4)
    for length in PREFILLS:
        result[f"prefill {length}"] = length / median_seconds(partial(generate, 1, length, 1), repeats)
    for sequences in DECODES:
        first = median_seconds(partial(generate, sequences, DECODE_PROMPT, 1), repeats)
        whole = median_seconds(partial(generate, sequences, DECODE_PROMPT, 1 + DECODE_TOKENS), repeats)
        result[f"decode {sequences}"] = sequences * DECODE_TOKENS / (whole - first)
    return result


def measure_start(model: Path) -> dict[str, float]:
    """Seconds from `vllm serve` to the first token, by what the log says was reached."""
    from openai import OpenAI

    from kimi_demo.server import Server

    reached = {
        "API server imported, flags read": "non-default args",
        "engine core imported and configured": "Initializing a V1 LLM engine",
        "worker imported, weights loading": "Starting to load model",
        "weights loaded": "Loading weights took",
        "cache allocated, engine ready": "init engine",
    }
    marks: dict[str, float] = {}
    flags = ["--dtype=float32", "--max-model-len=8192", "--kv-cache-memory-bytes=1G"]
    server = Server(model, flags, log_path=model.parent / "start.log")

    def watch(seconds: float) -> None:
        log = server.log
        for phase, mark in reached.items():
            if phase not in marks and mark in log:
                marks[phase] = seconds

    begun = time.perf_counter()
    with_start = server.start(waiting=watch)
    try:
        watch(time.perf_counter() - begun)
        marks["HTTP answers"] = time.perf_counter() - begun
        client = OpenAI(base_url=f"{with_start.url}/v1", api_key="none")
        client.completions.create(model=server.model, prompt=[40, 41, 42], max_tokens=1)
        marks["first token"] = time.perf_counter() - begun
    finally:
        server.stop()
    return marks


def measure_profile(model: Path, sequences: int) -> dict[str, float]:
    """Milliseconds of self time by operation in a decode step of so many sequences, bf16, by vLLM's torch profiler."""
    import tempfile

    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=8192,
            kv_cache_memory_bytes=1 << 30,
            enable_prefix_caching=False,
            profiler_config={
                "profiler": "torch",
                "torch_profiler_dir": folder,
                "torch_profiler_with_stack": False,
            },
        )
        vocab = sizes_of(model).vocab_size
        asked = [{"prompt_token_ids": token_ids(DECODE_PROMPT, vocab, seed)} for seed in range(sequences)]
        params = SamplingParams(temperature=0, max_tokens=1 + DECODE_TOKENS, ignore_eos=True)
        engine.generate(asked, params, use_tqdm=False)
        engine.start_profile()
        engine.generate(asked, params, use_tqdm=False)
        engine.stop_profile()
        (report,) = Path(folder).glob("*rank0*.txt")
        return _self_times(report.read_text(), steps=1 + DECODE_TOKENS)


def _self_times(report: str, steps: int) -> dict[str, float]:
    """The twelve operations with the most self time in torch's table, in ms a step."""
    scale = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    times = {}
    for line in report.splitlines():
        row = re.match(r"\s*(\S.*?)\s+[\d.]+%\s+([\d.]+)(us|ms|s)\s+[\d.]+%", line)
        if row:
            times[row[1]] = float(row[2]) * scale[row[3]] / steps
    most = sorted(times, key=lambda name: times[name], reverse=True)[:12]
    return {name: times[name] for name in most}


def measure_llama(binary: Path, gguf: Path) -> dict[str, float]:
    """Tokens a second of llama.cpp's own benchmark, where a binary and a converted model are given."""
    result = {}
    for length in PREFILLS:
        rows = _llama_rows(binary, gguf, "-p", str(length), "-n", "0")
        result[f"prefill {length}"] = rows[0]["avg_ts"]
    result["decode 1"] = _llama_rows(binary, gguf, "-p", "0", "-n", str(DECODE_TOKENS))[0]["avg_ts"]
    return result


def _llama_rows(binary: Path, gguf: Path, *flags: str) -> list[dict]:
    command = [str(binary), "-m", str(gguf), "-o", "json", *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# The arithmetic of the floor, and the table.


def floor_rates(model_sizes: ModelSizes, machine: dict[str, float], dtype: str) -> dict[str, float]:
    """Tokens a second if only weights were read (at the read bandwidth) and multiplied (at the GEMM rate)."""
    sizes = {"head": 0, "routed": 0, "dense": 0}
    for weight in tensors.weights(model_sizes):
        kind = "head" if weight.name == "lm_head.weight" else "routed" if ".experts." in weight.name else "dense"
        if "embed_tokens" not in weight.name:
            sizes[kind] += math.prod(weight.shape)
    share = model_sizes.experts_per_token / model_sizes.num_experts
    active = sizes["dense"] + share * sizes["routed"]
    rates = {}
    for length in PREFILLS:
        rates[f"prefill {length}"] = length / (2 * (length * active + sizes["head"]) / (machine[dtype] * 1e9))
    for rows in DECODES:
        touched = sizes["dense"] + sizes["head"] + sizes["routed"] * (1 - (1 - share) ** rows)
        reading = touched * BYTES[dtype] / (machine["read"] * 1e9)
        multiplying = 2 * rows * (active + sizes["head"]) / (machine[dtype] * 1e9)
        rates[f"decode {rows}"] = rows / max(reading, multiplying)
    return rates


def table(results: dict[str, dict[str, float]], model_sizes: ModelSizes, command: str) -> str:
    machine = results["floor"]
    lines = [
        "# Speed on a CPU",
        "",
        f"    {command}",
        "",
        f"{_processor()}, {os.cpu_count()} cores, {date.today()}, {_versions()}. Read bandwidth "
        f"{machine['read']:.1f} GB/s, GEMM {machine['bfloat16']:.0f} GFLOP/s bf16 and "
        f"{machine['float32']:.0f} fp32, measured in the same run. Medians; tokens a second, all sequences "
        "together; in brackets the share of the floor (weights read once a step at that bandwidth, or "
        "multiplied at that rate, whichever takes longer).",
        "",
    ]
    for dtype in BYTES:
        floors = floor_rates(model_sizes, machine, dtype)
        ours, theirs = results[f"ours {dtype}"], results[f"transformers {dtype}"]
        llama = results.get("llama.cpp", {}) if dtype == "bfloat16" else {}
        llama_head, llama_rule = (" llama.cpp |", " --- |") if llama else ("", "")
        lines += [
            f"| {dtype} | ours | transformers |{llama_head} ratio to transformers | to reach | floor |",
            f"| --- | --- | --- |{llama_rule} --- | --- | --- |",
        ]
        for row, floor in floors.items():
            shown = f" {_share(llama.get(row), floor)} |" if llama else ""
            target = f"{TARGETS[row]}x" if dtype == "bfloat16" else ""
            lines.append(
                f"| {row} | {_share(ours[row], floor)} | {_share(theirs[row], floor)} |{shown} "
                f"{ours[row] / theirs[row]:.1f}x | {target} | {floor:.0f} |"
            )
        lines.append("")
    for sequences in DECODES:
        lines += [
            f"Where a decode step of {sequences} goes, bf16 (vLLM's torch profiler, self time; the rest is smaller):",
            "",
            "| operation | ms a step |",
            "| --- | --- |",
            *(f"| `{name}` | {spent:.2f} |" for name, spent in results[f"profile {sequences}"].items()),
            "",
        ]
    lines += ["Seconds from `vllm serve` (demo checkpoint) until:", "", "| reached | after |", "| --- | --- |"]
    lines += [f"| {phase} | {seconds:.1f} s |" for phase, seconds in results["start"].items()]
    return "\n".join(lines) + "\n"


def _share(rate: float | None, floor: float) -> str:
    return "-" if rate is None else f"{rate:.1f} ({100 * rate / floor:.0f}%)"


def _processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def _versions() -> str:
    import importlib.metadata

    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm", "torch", "transformers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/bench"), help="where the checkpoint is kept")
    parser.add_argument("--out", type=Path, help="write the table here instead of printing it")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench, for a third column")
    parser.add_argument("--gguf", type=Path, help="the same checkpoint converted for llama.cpp, bf16")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # the child processes
    args = parser.parse_args()
    small = args.model.parent / "model"
    if args.only:
        what, *rest = args.only
        measures: dict[str, Callable[..., dict[str, float]]] = {
            "floor": measure_floor,
            "ours": lambda dtype: measure_ours(args.model, dtype),
            "transformers": lambda dtype: measure_transformers(args.model, dtype),
            "start": lambda: measure_start(small),
            "profile": lambda sequences: measure_profile(args.model, int(sequences)),
        }
        print(json.dumps(measures[what](*rest)))
        return
    if not (args.model / "config.json").exists():
        write_checkpoint(args.model, "bench")
    if not (small / "config.json").exists():
        write_checkpoint(small)
    results = {}
    jobs = ["floor", "start", *(f"profile {sequences}" for sequences in DECODES)]
    jobs += [f"{who} {dtype}" for dtype in BYTES for who in ("ours", "transformers")]
    for job in jobs:
        print(f"{job} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--model", str(args.model), "--only", *job.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**DEFAULT_ENV, **os.environ})
        # vLLM logs to standard output, also after the result.
        results[job] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        print(f"  {results[job]}", file=sys.stderr, flush=True)
    if args.llama_bench and args.gguf:
        results["llama.cpp"] = measure_llama(args.llama_bench, args.gguf)
    text = table(results, sizes_of(args.model), "python " + " ".join(sys.argv))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
