"""The figures of all runs as they come, kept in a file and shown in a table beside their floors."""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.common import BANDWIDTHS, CONFIG, MILLION, gpus, versions
from benchmarks.h200.quantised import quantised
from benchmarks.h200.rows import tokens_of
from benchmarks.h200.runs import LAYERS, RUNS, model_config
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import stored_as

PAGE = Path("docs/benchmarks/h200.md")


def machine() -> str:
    """The GPUs and the versions that matter."""
    return f"{gpus()}, {versions('vllm', 'torch', 'triton')}"


def tpot_floor(
    model_sizes: ModelSizes, sequences: int, context: int, bandwidth: float = BANDWIDTHS["H200"], gpus: int = 1
) -> float:
    """Seconds a token if each step only read its weights, latents and states, and wrote the states.

    Several GPUs share weights and states; each reads all latents.
    """
    share = model_sizes.experts_per_token / model_sizes.num_experts
    touched = 1 - (1 - share) ** sequences
    weights = sum(
        _stored_bytes(w, model_sizes) * (touched if ".experts." in w.name else 1)
        for w in tensors.weights(model_sizes)
        if "embed_tokens" not in w.name
    )
    plan = layout.cache_layout(model_sizes, activation_dtype="bfloat16", kv_bytes=0)
    state = 2 * plan.kda_state_bytes_per_sequence
    return ((weights + sequences * state) / gpus + sequences * plan.mla_bytes_per_token * context) / bandwidth


def _stored_bytes(weight: tensors.Weight, model_sizes: ModelSizes) -> int:
    scheme = stored_as(weight, model_sizes)
    if scheme is None:
        return math.prod(weight.shape) * 2
    rows, columns = weight.shape
    return sum(math.prod(shape) * size for shape, size in scheme.tensors(rows, columns).values())


class Results:
    """The figures of all runs at one depth on so many GPUs, kept in a file and shown in a table."""

    def __init__(
        self, folder: Path, layers: int, gpus: int, out: Path | None, note: str = "", weights: str = "bf16"
    ) -> None:
        self.file, self.layers, self.gpus = folder / f"{layers}-layers-{gpus}.json", layers, gpus
        self.out, self.note, self.weights = out, note, weights
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
            self.out.write_text(table(self.runs, self.layers, self.gpus, self.note, self.out, self.weights))


def table(
    runs: dict[str, dict[str, Any]],
    layers: int = LAYERS,
    gpus: int = 1,
    note: str = "",
    out: Path = PAGE,
    weights: str = "bf16",
) -> str:
    """The page, in Markdown; `out` is its name in the command that makes it."""
    shown = [name for name in RUNS if name in runs]
    machines = " ".join(runs[name]["machine"] for name in shown)
    gpu = next((name for name in BANDWIDTHS if name in machines), "H200")
    quantised_to = "" if weights == "bf16" else f", weights in {weights}"
    stored = "" if weights == "bf16" else f" --weights {weights}"
    lines = [
        f"# The whole server on {'one GPU' if gpus == 1 else f'{gpus} GPUs'}, {layers} layers{quantised_to}",
        "",
        f"    python -m benchmarks.h200 --layers {layers} --gpus {gpus}{stored} --out {out}",
        "",
        f"{layers} of the 48B's {LAYERS} layers, with random weights. ms; the floor counts latents, states and "
        f"weights, experts as if chosen evenly, of ours at {BANDWIDTHS[gpu] / 1e12} TB/s. "
        "Requests of one row have different prompts.",
        "",
        *([note, ""] if note else []),
    ]
    floors = {"floor": RUNS["ours"]} | {f"floor, {name}": RUNS[name] for name in shown if RUNS[name].attention_only}
    base = json.loads(CONFIG.read_text()) | quantised(weights)
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
