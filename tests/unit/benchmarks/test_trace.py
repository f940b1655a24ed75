"""Traces of vLLM's profiler: recorded between first and last tokens, and told by steps and kinds of kernel."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import trace


@pytest.mark.parametrize(
    "experts", [("fused_moe_kernel", "fused_moe_kernel"), ("experts_up_kernel", "experts_down_kernel")]
)
def test_a_trace_is_told_by_steps_and_kinds(experts: tuple[str, str]):
    layer = [
        (experts[0], 0, 10),
        (experts[1], 5, 10),
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
    assert trace.kind("router_kernel") == "experts"
    assert trace.kind("linear_kernel") == "dense products"
    assert trace.kind("triton_poi_fused_add_0") == "the rest"


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
