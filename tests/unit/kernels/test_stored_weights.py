"""The decode kernels on weights of 8 and 4 bits: in Triton's interpreter (`tests/e2e/kernels`) and on GPUs."""

import importlib
import os

import pytest
import torch
from torch import Tensor

from decode_kernels import interface, reference
from decode_kernels.weights import QuantizedWeight

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5
# dtype of the values; columns and rows that share a scale, None for all of a row
FORMS = {
    "fp8, a scale a row": (torch.float8_e4m3fn, None, 1),
    "fp8, one scale": (torch.float8_e4m3fn, None, 1 << 20),
    "fp8, blocks": (torch.float8_e4m3fn, 128, 128),
    "int8, a scale a row": (torch.int8, None, 1),
    "int4, 32 columns": (torch.int32, 32, 1),
    "int4, 128 columns": (torch.int32, 128, 1),
}


@pytest.fixture
def kernels(where):
    pytest.importorskip("triton")
    return interface.kernels("cuda")


@pytest.fixture
def make(where):
    device, activations = where
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = activations, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return draw


LONG = ("int8, a scale a row", "fp8, one scale", "int4, 128 columns")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.soak] * (name in LONG and INSIDE)) for name in FORMS])
def store(request, where):
    """store(*shape): a weight with every value that one of this form can have, and scales of very different sizes."""
    values, columns, rows = FORMS[request.param]
    device, activations = where
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> QuantizedWeight:
        *outer, height, width = shape
        group = columns or 1 << max(width - 1, 15).bit_length()
        scales = torch.rand(*outer, -(-height // rows), -(-width // group), generator=generator) ** 4 + 1e-3
        scales = (scales / (8 if values == torch.int32 else 128)).to(device)
        if values == torch.int32:
            drawn = torch.randint(-(1 << 31), 1 << 31, (*outer, height, width // 8), generator=generator)
            return QuantizedWeight(drawn.to(device, torch.int32), scales.to(activations), group)
        drawn = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        if values != torch.int8:
            drawn[(drawn & 0x7F) == 0x7F] = 1  # not a number
        return QuantizedWeight(drawn.to(device).view(values), scales, group, rows)

    return draw


def close(found: Tensor, wanted: Tensor) -> None:
    bound = 3e-5 if found.dtype == torch.float32 else 4e-3  # 4-bit integers are multiplied as 128 and more
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < bound, error
    assert found.shape == wanted.shape


# 384: no power of two; 128: less than two blocks.
@pytest.mark.parametrize(("K", "N"), [(384, 256), (128, 128)])
@pytest.mark.parametrize("tokens", [1, 2, pytest.param(5, marks=[pytest.mark.soak] * INSIDE)])
def test_linear(tokens, K, N, make, store, kernels):
    x, residual, norm, weight = make(tokens, 2 * K)[:, K:], make(tokens, K), make(K), store(N, K)
    close(kernels.linear(x, weight), reference.linear(x, weight))
    found = kernels.norm_linear(x, residual, norm, weight, EPS)
    wanted = reference.norm_linear(x, residual, norm, weight, EPS)
    for part, other in zip(found, wanted, strict=True):
        close(part, other)


@pytest.mark.parametrize("tokens", [1, 3])
def test_router(tokens, make, store, kernels):
    K, experts = 384, 20
    x, residual, norm = make(tokens, K), make(tokens, K), make(K)
    gate, bias = make(experts, K, dtype=torch.float32, scale=K**-0.5), make(experts, dtype=torch.float32, scale=0.01)
    shared, done = store(256, K), torch.zeros(1, dtype=torch.int32, device=x.device)
    both = (x, residual, norm, EPS, gate, bias, shared, done)
    found = kernels.router(*both, top_k=3, renormalize=True, scale=2.4)
    wanted = reference.router(*both[:-1], top_k=3, renormalize=True, scale=2.4)
    assert torch.equal(found[2], wanted[2])
    for part in (0, 1, 3, 4):
        close(found[part], wanted[part])
    assert done.item() == 0


@pytest.mark.parametrize("plain", ["experts", "shared", "nothing"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts(tokens, plain, make, store, kernels):
    experts, top_k, K, inter = 6, 3, 384, 128
    x, weights = make(tokens, K), make(tokens, top_k, dtype=torch.float32).abs()
    ids = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(n))[:top_k] for n in range(tokens)]
    )
    up, down, shared = store(experts, 2 * inter, K), store(experts, K, inter), store(K, inter)
    if plain == "experts":
        up, down = (weight.float().to(x.dtype) for weight in (up, down))
    elif plain == "shared":
        shared = shared.float().to(x.dtype)
    ids = ids.int().to(x.device)
    parts = importlib.import_module("decode_kernels.cuda.experts")
    tile = {"BN": 64} if INSIDE else {}  # rows of a program: the interpreter takes as long for few as for many
    acts = parts.experts_up(x, up, ids, **tile)
    close(acts, reference.experts_up(x, up, ids))
    rest = (down, ids, weights, make(tokens, inter), shared)
    close(parts.experts_down(acts, *rest, **tile), reference.experts_down(acts, *rest))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_experts_with_products_in_half_precision(size, make, store, kernels):
    """Whatever the size of the activations; a token of zeros has zeros."""
    parts = importlib.import_module("decode_kernels.cuda.experts")
    up, down, shared = store(4, 256, 384), store(4, 384, 128), store(384, 128)
    if up.values.dtype == torch.int32:
        pytest.skip("of weights of eight bits")
    x, acts = make(2, 384, scale=size), make(4, 128, scale=size)
    x[0, 7] *= 1000  # the others are small beside it
    x[1] = 0
    ids, weights = torch.tensor([[0, 3], [2, 0]], device=x.device).int(), make(2, 2, dtype=torch.float32).abs()
    options = {"HALVES": True} | ({"BN": 64} if INSIDE else {})
    found = parts.experts_up(x, up, ids, **options)
    assert not found[2:].any()
    rest = (down, ids, weights, make(2, 128, scale=size), shared)
    for one, other in (
        (found, reference.experts_up(x, up, ids)),
        (parts.experts_down(acts, *rest, **options), reference.experts_down(acts, *rest)),
    ):
        assert (one.double() - other.double()).norm() < (2e-3 if INSIDE else 5e-3) * other.double().norm()
