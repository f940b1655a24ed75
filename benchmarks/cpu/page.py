"""The page with the figures of one run."""

import os
from datetime import date

from benchmarks.common import processor, versions
from benchmarks.cpu.engines import WEIGHTS
from benchmarks.cpu.floor import BYTES, floor_rates
from benchmarks.cpu.rows import DECODES
from vllm_kimi_linear.config.model import ModelSizes

TARGETS = {"prefill 512": 4, "prefill 4096": 6, "decode 1": 3, "decode 16": 10}


def table(results: dict[str, dict[str, float]], model_sizes: ModelSizes, command: str) -> str:
    machine = results["floor"]
    made_by = versions("vllm", "torch", "transformers")
    lines = [
        "# Speed on a CPU",
        "",
        f"    {command}",
        "",
        f"{processor()}, {os.cpu_count()} cores, {date.today()}, {made_by}. Read bandwidth "
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
    lines += [
        "Ours with weights in fewer bits, activations in bfloat16 (all linear layers but the output matrix; int4 in "
        "groups of 32), in brackets times the rate with weights in bfloat16:",
        "",
        f"| | {' | '.join(WEIGHTS)} |",
        "| --- " * (1 + len(WEIGHTS)) + "|",
    ]
    for row, plain in results["ours bfloat16"].items():
        rates = [results[f"narrow {weights}"][row] for weights in WEIGHTS]
        lines.append(f"| {row} | " + " | ".join(f"{rate:.1f} ({rate / plain:.2f})" for rate in rates) + " |")
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
