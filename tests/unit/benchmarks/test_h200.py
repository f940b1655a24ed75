"""The arithmetic of the whole-server benchmark: its floors and the models it serves."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import chunks
from benchmarks.common import CONFIG
from benchmarks.h200.results import Results, table, tpot_floor
from benchmarks.h200.rows import TIMES, Rows
from benchmarks.h200.runs import LAYERS, RUNS, model_config
from benchmarks.load import Load, Reply
from vllm_kimi_linear.config.model import ModelSizes

BASE = json.loads(CONFIG.read_text())
WHOLE = ModelSizes.from_config(BASE)


@pytest.mark.parametrize(
    ("sequences", "context", "milliseconds"),
    [(1, 4096, 1.32), (1, 131072, 1.53), (1, 1 << 20, 3.07), (8, 4096, 5.28), (8, 131072, 6.99), (32, 131072, 20.8)],
)
def test_floor_of_a_decode_step(sequences: int, context: int, milliseconds: float):
    """Against figures worked out by hand."""
    assert tpot_floor(WHOLE, sequences, context) * 1e3 == pytest.approx(milliseconds, rel=5e-3)


def test_two_gpus_share_weights_and_states_but_not_latents():
    short, long = (tpot_floor(WHOLE, 1, n) / tpot_floor(WHOLE, 1, n, gpus=2) for n in (1, 100 << 20))
    assert short == pytest.approx(2, rel=1e-3)
    assert long == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_valid_config_and_known_rows(name: str):
    run = RUNS[name]
    model_sizes = ModelSizes.from_config(model_config(run, BASE))
    assert model_sizes.num_layers == LAYERS
    assert (len(model_sizes.kda_layers) == 0) == run.attention_only
    assert {row.split()[0] for row in run.rows} <= {"ttft", "tpot", "poisson", "million"}


def test_every_server_has_the_same_requests(monkeypatch):
    """Whatever rows it had before."""
    sent: list[list[list[int]]] = []

    def at_once(prompts: list[list[int]], tokens: int) -> list[Reply]:
        sent.append(prompts)
        return [Reply(asked=0.0, times=[1.0, 2.0], counts=[1, 1]) for _ in prompts]

    load = Load("http://server", "model", vocab=1000)
    monkeypatch.setattr(load, "at_once", at_once)
    rows = Rows(load, scale=64)
    for row in ("tpot 8 4K", "ttft 8K", "tpot 8 4K"):
        rows.measure(row)
    assert sent[:TIMES] == sent[-TIMES:]
    assert len({str(prompts) for prompts in sent[:-TIMES]}) == len(sent) - TIMES


def test_answers_in_other_chunk_sizes_are_compared_with_the_first():
    text = chunks.page({4096: {10: [5, 6, 5, 6]}, 256: {10: [5, 6, 7, 6]}}, Path("page.md"))
    assert "| 10 | 256 | 3 of 4 | 2 |" in text


def test_a_table_shows_what_was_measured_and_what_was_not():
    kept = {
        "machine": "NVIDIA H100 80GB HBM3",
        "start": 60.0,
        "flags": "--dtype=bfloat16",
        "rows": {"tpot 1 4K": {"tpot": 0.002}, "million": {"error": "TimeoutError: "}},
    }
    text = table({"ours": kept, "vLLM": {**kept, "rows": {}}})
    assert f"| tpot 1 4K: tpot | 2.00 | - | {1.32 * 4.8 / 3.35:.2f} |" in text
    assert "| million: error | TimeoutError:  | - |  |" in text


def test_the_floor_of_quantised_weights_is_that_of_their_bytes():
    kept = {"machine": "NVIDIA H200", "start": 60.0, "flags": "", "rows": {"tpot 1 4K": {"tpot": 0.002}}}
    text = table({"ours": kept}, weights="fp8")
    assert "--weights fp8 --out" in text and "27 layers, weights in fp8" in text
    (floor,) = re.findall(r"\| tpot 1 4K: tpot \| 2.00 \| (\S+) \|", text)
    assert 0.66 < float(floor) < 0.8  # half of 1.32, and what stays in bf16: router, head, states


def test_what_is_missing_or_failed_is_measured_again(tmp_path: Path):
    results = Results(tmp_path, 27, 1, None)
    results.started("ours", 60.0, "")
    results.add("ours", "tpot 1 4K", {"tpot": 0.002})
    results.add("ours", "ttft 8K", {"error": "TimeoutError: "})
    again = Results(tmp_path, 27, 1, None)
    assert again.missing("ours", ["tpot 1 4K", "ttft 8K", "million"]) == ["ttft 8K", "million"]
    assert Results(tmp_path, 16, 1, None).missing("ours", ["tpot 1 4K"]) == ["tpot 1 4K"]
    assert Results(tmp_path, 27, 2, None).missing("ours", ["tpot 1 4K"]) == ["tpot 1 4K"]
