"""The C kernels of a decode step, beyond what they share with the others (`test_decode_step.py`): bits and limits."""

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from decode_kernels import interface, reference

cpu = interface.kernels("cpu")
MODULES = [importlib.import_module(f"decode_kernels.cpu.{name}") for name in ("products", "experts", "latents")]
TOKENS = 200  # more than are multiplied at once, twice, and a rest
K, INTER, EXPERTS, TOP_K, EPS = 2 * 768 + 40, 24, 7, 3, 1e-5  # columns: two pieces and a rest


@pytest.fixture(params=range(1, MODULES[0]._isa + 1), ids=["baseline", "AVX2", "AVX-512"][: MODULES[0]._isa])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each instruction set that this machine has."""
    for module in MODULES:
        monkeypatch.setattr(module, "_isa", request.param)
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.25).to(dtype)


class Layer:
    """What each operation gives for some of the tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.x, self.residual = draw(TOKENS, K, dtype=dtype), draw(TOKENS, K, dtype=dtype, seed=1)
        self.norm, self.weight = draw(K, dtype=dtype), draw(77, K, dtype=dtype)  # two panels, three tiles and a row
        self.gate, self.bias = draw(EXPERTS, K, dtype=torch.float32), draw(EXPERTS, dtype=torch.float32)
        self.shared_up, self.shared_down = draw(2 * INTER, K, dtype=dtype), draw(K, INTER, dtype=dtype)
        self.up, self.down = draw(EXPERTS, 2 * INTER, K, dtype=dtype), draw(EXPERTS, K, INTER, dtype=dtype)
        self.kv_b, self.latent_norm = draw(2, 40, 64, dtype=dtype), draw(64, dtype=dtype)
        self.cache = torch.zeros(TOKENS, 4, 64 + 8, dtype=dtype)

    def run(self, of: object, tokens: slice) -> list[Tensor]:
        kernels = of
        x, residual = self.x[tokens], self.residual[tokens]
        more = (torch.zeros(1, dtype=torch.int32),) if of is cpu else ()
        norm = (x, residual, self.norm, EPS, self.gate, self.bias, self.shared_up, *more)
        routed = kernels.router(*norm, top_k=TOP_K, renormalize=True, scale=2.5)  # type: ignore[attr-defined]
        ids = torch.stack([torch.arange(TOP_K) + token for token in range(TOKENS)])[tokens].int() % EXPERTS
        choice = (ids, draw(TOKENS, TOP_K, dtype=torch.float32)[tokens])
        acts = self.x[tokens, :INTER].contiguous()
        projected = self.x[tokens, : 2 * (24 + 8) + 64 + 8]
        cache, slots = self.cache.clone(), 4 * torch.arange(TOKENS)[tokens] + 1
        latents = (projected, self.kv_b, self.latent_norm, EPS, cache, slots, 24)
        return [
            kernels.linear(x, self.weight),  # type: ignore[attr-defined]
            *kernels.norm_linear(x, residual, self.norm, self.weight, EPS),  # type: ignore[attr-defined]
            *routed,
            kernels.experts(x, self.up, self.down, *choice, acts, self.shared_down),  # type: ignore[attr-defined]
            kernels.latent_query(*latents),  # type: ignore[attr-defined]
            cache[tokens],
            kernels.latent_value(self.x[tokens, :128].unflatten(1, (2, 64)), self.kv_b, 24),  # type: ignore[attr-defined]
        ]


def test_right_with_each_instruction_set(isa: int, dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    for found, wanted in zip(layer.run(cpu, slice(None)), layer.run(reference, slice(None)), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    "tokens",
    [slice(0, 1), slice(7, 9), slice(40, 45), slice(48, 150), slice(196, 197)]
    + [slice(3, 3 + n) for n in (6, 7, 8, 9, 11, 13)],  # groups of each size
    ids=str,
)
def test_a_token_has_the_same_bits_in_any_step(isa: int, dtype: torch.dtype, tokens: slice) -> None:
    layer = Layer(dtype)
    for few, all_tokens in zip(layer.run(cpu, tokens), layer.run(cpu, slice(None)), strict=True):
        assert torch.equal(few, all_tokens[tokens])


def test_and_on_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    layer, found = Layer(dtype), []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        found.append(layer.run(cpu, slice(None)))
    for one, two, seven in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, seven)


def test_experts_in_parts_of_many_tokens(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    whole = layer.run(cpu, slice(None))[-4]
    monkeypatch.setattr(MODULES[1], "_TOKENS", 10)
    assert torch.equal(layer.run(cpu, slice(None))[-4], whole)


def test_an_expert_of_another_rank_adds_nothing() -> None:
    layer = Layer(torch.float32)
    ids, weights = torch.tensor([[2, 5, -1], [-1, -1, -1]]), torch.tensor([[0.5, 2.0, math.inf], [1.0, 1.0, 1.0]])
    found = cpu.experts(layer.x[:2], layer.up, layer.down, ids, weights)
    wanted = reference.experts(layer.x[:1], layer.up, layer.down, ids[:1, :2], weights[:1, :2], layer.x[:1, :1], None)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert (found[1] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_with_its_token(dtype: torch.dtype, value: float) -> None:
    layer = Layer(dtype)
    wanted = layer.run(cpu, slice(None))
    layer.x[5, 3] = value
    others = torch.arange(TOKENS) != 5
    for found, before in zip(layer.run(cpu, slice(None)), wanted, strict=True):
        assert torch.equal(found[others], before[others])


def test_no_tokens_and_one_column(dtype: torch.dtype) -> None:
    assert cpu.linear(draw(0, K, dtype=dtype), draw(3, K, dtype=dtype)).shape == (0, 3)
    x, weight = draw(3, 1, dtype=dtype), draw(5, 1, dtype=dtype)
    assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))
    layer = Layer(dtype)
    assert layer.run(cpu, slice(0, 0))[-4].shape == (0, K)


def test_columns_of_any_stride(dtype: torch.dtype) -> None:
    x, weight = draw(K, 6, dtype=dtype).T, draw(9, K, dtype=dtype)
    assert torch.equal(cpu.linear(x, weight), cpu.linear(x.contiguous(), weight))
