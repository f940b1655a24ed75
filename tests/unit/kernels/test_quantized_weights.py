"""Products with weights of 8 and 4 bits: as those with the fp32 that they stand for, the same bits in any step."""

import pytest
import torch
from torch import Tensor

from decode_kernels import reference
from decode_kernels.weights import QuantizedWeight

cpu = pytest.importorskip("decode_kernels.cpu", reason="the C library was not built")
MODULES = [pytest.importorskip(f"decode_kernels.cpu.{name}") for name in ("products", "experts")]
TOKENS, K, INTER, EXPERTS, TOP_K, EPS = 110, 328, 72, 5, 2, 1e-5
KINDS = {
    "fp8, a scale a row": (torch.float8_e4m3fn, 1024),
    "fp8, 128 columns": (torch.float8_e4m3fn, 128),
    "int8, a scale a row": (torch.int8, 1024),
    "int8, 16 columns": (torch.int8, 16),
    "int4, 32 columns": (torch.int32, 32),
    "int4, a scale a row": (torch.int32, 1024),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[torch.dtype, int]:
    return KINDS[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1, 2, 3], ids=["base", "AVX2", "AVX-512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if request.param > MODULES[0]._isa:
        pytest.skip("this processor does not have it")
    for module in MODULES:
        monkeypatch.setattr(module, "_isa", request.param)
    return request.param


def stored(*shape: int, kind: tuple[torch.dtype, int], seed: int) -> QuantizedWeight:
    """Every value that a weight of this kind can have, and scales of very different sizes."""
    dtype, group = kind
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(*shape[:-1], -(-shape[-1] // group), generator=generator) ** 4 + 1e-3
    if dtype == torch.int32:
        drawn = torch.randint(-(1 << 31), 1 << 31, (*shape[:-1], shape[-1] // 8), generator=generator)
        return QuantizedWeight(drawn.to(torch.int32), scales / 8, group)
    drawn = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    if dtype == torch.int8:
        return QuantizedWeight(drawn.view(torch.int8), scales / 128, group)
    drawn[(drawn & 0x7F) == 0x7F] = 1  # not a number
    return QuantizedWeight(drawn.view(dtype), scales / 64, group)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5).to(dtype)


class Layer:
    def __init__(self, kind: tuple[torch.dtype, int], dtype: torch.dtype) -> None:
        self.x, self.residual = (draw(TOKENS, K, dtype=dtype, seed=seed) for seed in (1, 2))
        self.norm, self.gate = draw(K, dtype=dtype), draw(EXPERTS, K, dtype=torch.float32)
        self.weight = stored(37, K, kind=kind, seed=3)
        self.up, self.down = (
            stored(EXPERTS, 2 * INTER, K, kind=kind, seed=4),
            stored(EXPERTS, K, INTER, kind=kind, seed=5),
        )
        self.shared_up, self.shared_down = stored(2 * INTER, K, kind=kind, seed=6), stored(K, INTER, kind=kind, seed=7)
        self.acts = draw(TOKENS, INTER, dtype=dtype, seed=8)
        generator = torch.Generator().manual_seed(9)
        self.ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)]).int()
        self.weights = torch.rand(TOKENS, TOP_K, generator=generator)

    def run(self, kernels: object, tokens: slice) -> list[Tensor]:
        x, residual = self.x[tokens], self.residual[tokens]
        done = () if kernels is reference else (None,)
        norm = (x, residual, self.norm, EPS, self.gate, torch.zeros(EXPERTS), self.shared_up, *done)
        choice = (self.ids[tokens], self.weights[tokens], self.acts[tokens], self.shared_down)
        return [
            kernels.linear(x, self.weight),  # type: ignore[attr-defined]
            kernels.norm_linear(x, residual, self.norm, self.weight, EPS)[0],  # type: ignore[attr-defined]
            kernels.router(*norm, top_k=TOP_K, renormalize=True, scale=1.0)[4],  # type: ignore[attr-defined]
            kernels.experts(x, self.up, self.down, *choice),  # type: ignore[attr-defined]
        ]


def test_as_the_weights_that_they_stand_for(kind: tuple[torch.dtype, int], dtype: torch.dtype, isa: int) -> None:
    layer = Layer(kind, dtype)
    for found, wanted in zip(layer.run(cpu, slice(None)), layer.run(reference, slice(None)), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("tokens", [slice(0, 1), slice(7, 9), slice(40, 46), slice(90, 110)])
def test_the_same_bits_in_any_step(kind: tuple[torch.dtype, int], dtype: torch.dtype, isa: int, tokens: slice) -> None:
    layer = Layer(kind, dtype)
    for few, every in zip(layer.run(cpu, tokens), layer.run(cpu, slice(None)), strict=True):
        assert torch.equal(few, every[tokens])


def test_a_number_stands_for_what_torch_says(kind: tuple[torch.dtype, int], isa: int) -> None:
    weight = stored(40, 64, kind=kind, seed=1)
    assert torch.equal(cpu.linear(torch.eye(64), weight), weight.float().T)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": torch.zeros(4, 64)}, "values are torch.float32"),
        ({"group": 24}, "group is 24; give a power of two from 16"),
        ({"scales": torch.ones(4, 1)}, r"scales have shape \[4, 1\]; give \[4, 2\]"),
        ({"scales": torch.ones(4, 2, dtype=torch.float16)}, "scales in float32 or bfloat16"),
        ({"values": torch.zeros(64, 4, dtype=torch.int8).T}, "contiguous"),
    ],
)
def test_what_is_no_quantized_weight_is_refused(change: dict[str, object], words: str) -> None:
    right = {"values": torch.zeros(4, 64, dtype=torch.int8), "scales": torch.ones(4, 2), "group": 32}
    with pytest.raises(ValueError, match=words):
        QuantizedWeight(**(right | change))
