"""What the benchmarks of the kernels try, and their floors; that a decode step's kernels compile, without a GPU."""

import importlib
import os

import pytest

from bench import expert_tiles


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_tiles_worth_trying_fit_a_hopper(fp8):
    shape = expert_tiles.Shape(experts=256, width=1024, hidden=2304, chosen=8, fp8=fp8)
    for tokens in expert_tiles.TOKENS:
        tiles, size = list(expert_tiles.candidates(shape, tokens)), 1 if fp8 else 2
        assert 10 < len(tiles) < 50
        assert all(
            (t["BLOCK_SIZE_M"] + t["BLOCK_SIZE_N"]) * t["BLOCK_SIZE_K"] * size * t["num_stages"] < 1 << 18
            for t in tiles
        )
    assert expert_tiles.floor(shape, 1, 4.8e12) == pytest.approx(8 * 3 * 1024 * 2304 * size / 4.8e6)


COMPILED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled for the interpreter"
)


@COMPILED
@pytest.mark.parametrize(
    "kind", ["bf16", *(pytest.param(k, marks=pytest.mark.soak) for k in ("fp8", "fp8-block", "int4"))]
)
@pytest.mark.parametrize("tokens", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_the_kernels_of_a_decode_step_compile_without_spills(tokens, kind):
    pytest.importorskip("triton")
    compiled = importlib.import_module("bench.compiled")
    found = {name: compiled.report(*more) for name, *more in compiled.decode_steps(tokens, kind)}
    assert {name.partition(":")[0] for name in found} >= {"router", "experts_up", "experts_down", "latent_query"}
    assert {name: row for name, row in found.items() if int(row[1]) > 64} == {}  # bytes a thread


@COMPILED
@pytest.mark.parametrize("kind", ["bf16", "fp8", pytest.param("fp8-block", marks=pytest.mark.soak), "int4"])
@pytest.mark.parametrize("tokens", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_no_sum_of_few_products_depends_on_the_lane(tokens, kind, monkeypatch):
    """Seen by racecheck with these sizes: two lanes of a warp wrote different sums to one place in shared memory."""
    pytest.importorskip("triton")
    compiled, layer = (importlib.import_module(f"bench.{name}") for name in ("compiled", "decode_layer"))
    for name, value in {"HIDDEN": 96, "INTER": 64, "LATENT": 128, "VALUE": 64}.items():
        monkeypatch.setattr(layer, name, value)
    found = {name: compiled.compiled_variant(*more).asm["ptx"] for name, *more in compiled.decode_steps(tokens, kind)}
    found = {name: ptx for name, ptx in found.items() if not name.startswith("kda:")}  # each lane uses its own sum
    assert len(found) > 5
    assert all("shfl.sync.bfly" in ptx for name, ptx in found.items() if name.startswith("router"))
    assert {name: compiled.rounded_by_lane(ptx) for name, ptx in found.items()} == dict.fromkeys(found, 0)
