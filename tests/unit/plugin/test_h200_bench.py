"""The arithmetic of the whole-server benchmark: its floors and the models it serves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import chunks, expert_tiles, h200, trace
from benchmarks.load import Load, Reply, late_tpot, percentile, steady_tpot
from vllm_kimi_linear.config import Geometry

BASE = json.loads(h200.CONFIG.read_text())
WHOLE = Geometry.from_config(BASE)


@pytest.mark.parametrize(
    ("sequences", "context", "milliseconds"),
    [(1, 4096, 1.32), (1, 131072, 1.53), (1, 1 << 20, 3.07), (8, 4096, 5.28), (8, 131072, 6.99), (32, 131072, 20.8)],
)
def test_floor_of_a_decode_step(sequences: int, context: int, milliseconds: float):
    """Against figures worked out by hand."""
    assert h200.tpot_floor(WHOLE, sequences, context) * 1e3 == pytest.approx(milliseconds, rel=5e-3)


def test_two_gpus_share_weights_and_states_but_not_latents():
    short, long = (h200.tpot_floor(WHOLE, 1, n) / h200.tpot_floor(WHOLE, 1, n, gpus=2) for n in (1, 100 << 20))
    assert short == pytest.approx(2, rel=1e-3)
    assert long == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("name", h200.RUNS)
def test_every_run_has_a_valid_config_and_known_rows(name: str):
    run = h200.RUNS[name]
    geometry = Geometry.from_config(h200.model_config(run, BASE))
    assert geometry.num_layers == h200.LAYERS
    assert (len(geometry.kda_layers) == 0) == run.attention_only
    assert {row.split()[0] for row in run.rows} <= {"ttft", "tpot", "poisson", "million"}


def test_every_server_has_the_same_requests(monkeypatch):
    """Whatever rows it had before."""
    sent: list[list[list[int]]] = []

    def at_once(prompts: list[list[int]], tokens: int) -> list[Reply]:
        sent.append(prompts)
        return [Reply(asked=0.0, times=[1.0, 2.0], counts=[1, 1]) for _ in prompts]

    load = Load("http://server", "model", vocab=1000)
    monkeypatch.setattr(load, "at_once", at_once)
    rows = h200.Rows(load, scale=64)
    for row in ("tpot 8 4K", "ttft 8K", "tpot 8 4K"):
        rows.measure(row)
    assert sent[0] == sent[-1]
    assert sent[0] != sent[1]


def test_answers_in_other_chunk_sizes_are_compared_with_the_first():
    text = chunks.page({4096: {10: [5, 6, 5, 6]}, 256: {10: [5, 6, 7, 6]}}, Path("page.md"))
    assert "| 10 | 256 | 3 of 4 | 2 |" in text


def test_late_tpot_leaves_out_what_came_in_a_bunch():
    reply = Reply(asked=0.0, times=[9.0, 9.001, 9.002, 10.0, 12.0], counts=[1, 1, 1, 1, 3])
    assert late_tpot(reply) == pytest.approx((12.0 - 9.002) / 4)


def test_steady_tpot_counts_only_while_all_decode():
    early = Reply(asked=0.0, times=[1.0, 2.0, 3.0, 4.0, 5.0], counts=[1] * 5)
    late = Reply(asked=0.0, times=[3.0, 3.5, 4.0], counts=[1, 1, 2])
    assert steady_tpot([early]) == 1.0
    assert steady_tpot([early, late]) == pytest.approx((1.0 + 1 / 3) / 2)
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


def test_a_table_shows_what_was_measured_and_what_was_not():
    kept = {
        "machine": "NVIDIA H100 80GB HBM3",
        "start": 60.0,
        "flags": "--dtype=bfloat16",
        "rows": {"tpot 1 4K": {"tpot": 0.002}, "million": {"error": "TimeoutError: "}},
    }
    text = h200.table({"ours": kept, "vLLM": {**kept, "rows": {}}})
    assert f"| tpot 1 4K: tpot | 2.00 | - | {1.32 * 4.8 / 3.35:.2f} |" in text
    assert "| million: error | TimeoutError:  | - |  |" in text


def test_what_is_missing_or_failed_is_measured_again(tmp_path: Path):
    results = h200.Results(tmp_path, 27, 1, None)
    results.started("ours", 60.0, "")
    results.add("ours", "tpot 1 4K", {"tpot": 0.002})
    results.add("ours", "ttft 8K", {"error": "TimeoutError: "})
    again = h200.Results(tmp_path, 27, 1, None)
    assert again.missing("ours", ["tpot 1 4K", "ttft 8K", "million"]) == ["ttft 8K", "million"]
    assert h200.Results(tmp_path, 16, 1, None).missing("ours", ["tpot 1 4K"]) == ["tpot 1 4K"]
    assert h200.Results(tmp_path, 27, 2, None).missing("ours", ["tpot 1 4K"]) == ["tpot 1 4K"]


def test_a_trace_is_told_by_steps_and_kinds():
    layer = [
        ("fused_moe_kernel", 0, 10),
        ("fused_moe_kernel", 5, 10),
        ("kda_decode_kernel", 20, 5),
        ("nvjet_tst", 30, 10),
    ]
    spans = [trace.Span(name, 100 * step + begin, length) for step in range(3) for name, begin, length in layer]
    assert trace.busy(spans) == 3 * (15 + 5 + 10)
    table = list(trace.lines(spans, layers=1))
    assert table[0] == "3.0 steps of 80 us, of which the GPU works 30."
    assert {"| **experts** | 2.0 | 20 | 25% |", "| **KDA** | 1.0 | 5 | 6% |"} <= set(table)
    assert list(trace.each(spans, layers=1))[2:] == ["| 100 | 30 | 20 | 0 | 5 | 10 | 0 |"] * 2
    assert trace.kind("void flash::combine_kernel<float>") == "latent attention"
    assert trace.kind("triton_poi_fused_add_0") == "the rest"


def test_tiles_worth_trying_fit_a_hopper():
    shape = expert_tiles.Shape(experts=256, width=1024, hidden=2304, chosen=8)
    for tokens in expert_tiles.TOKENS:
        tiles = list(expert_tiles.candidates(shape, tokens))
        assert 10 < len(tiles) < 50
        assert all(
            (t["BLOCK_SIZE_M"] + t["BLOCK_SIZE_N"]) * t["BLOCK_SIZE_K"] * 2 * t["num_stages"] < 1 << 18 for t in tiles
        )
    assert expert_tiles.floor(shape, 1, 4.8e12) == pytest.approx(8 * 3 * 1024 * 2304 * 2 / 4.8e6)


def test_traces_are_named_by_what_was_asked(tmp_path: Path, monkeypatch):
    """A trace lies between the prompts' first tokens and their last."""
    calls: list[str] = []

    def post(url: str, timeout: float) -> SimpleNamespace:
        calls.append(url.rpartition("/")[2])
        if calls[-1] == "stop_profile":
            (tmp_path / f"rank0.{len(calls)}.json").touch()
        return SimpleNamespace(raise_for_status=lambda: None)

    def at_once(prompts: list[int], tokens: int) -> None:
        calls.append(f"{len(prompts)} x {prompts[0]}")
        load.begun.release(len(prompts))

    load: Any = SimpleNamespace(url="http://server", limit=5, prompt=lambda length: length, at_once=at_once)
    load.poisson = lambda prompts, tokens, rate: calls.append(f"{rate} a second of {prompts[0]}")
    monkeypatch.setattr(trace.httpx, "post", post)
    monkeypatch.setattr(trace.time, "sleep", lambda _: None)
    trace.Recorder(load, tmp_path).all(scale=2)
    around = ["start_profile", "stop_profile"]
    assert calls[:3] == ["1 x 2048", *around]
    assert calls[6:12] == ["32 x 2048", *around, "8 x 65536", *around]
    assert calls[12:15] == ["start_profile", "1 x 16384", "stop_profile"]
    assert set(calls[15:]) == {"16 a second of 1024", *around}
    names = sorted(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert names == [
        "arrivals-1024",
        *(f"decode-{n}" for n in ("1x2048", "32x2048", "8x2048", "8x65536")),
        "prefill-16384",
    ]


def test_a_trace_of_prompts_that_never_begin_is_given_up(tmp_path: Path):
    load: Any = SimpleNamespace(limit=0.01, prompt=lambda length: length, at_once=lambda prompts, tokens: None)
    with pytest.raises(RuntimeError, match="not all of 8 prompts of 4096 tokens"):
        trace.Recorder(load, tmp_path).decode(8, 4096)
