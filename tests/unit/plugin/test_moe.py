"""A layer of experts in a decode step, whoever reads its weights."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from decode_kernels import interface, reference
from vllm_kimi_linear import moe

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 3, 32, 16, 4, 2


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def forward_modular(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """vLLM's kernel, which has the weights in an order of its own: the routed experts alone."""
    up, down = random(EXPERTS, 2 * WIDTH, HIDDEN), random(EXPERTS, HIDDEN, WIDTH)
    return reference.experts(x, up, down, ids, weights, x.new_empty(len(x), 0), None)


def layer(shared: bool) -> SimpleNamespace:
    gate = SimpleNamespace(weight=random(EXPERTS, HIDDEN), e_score_correction_bias=torch.zeros(EXPERTS))
    routed = SimpleNamespace(
        w13_weight=random(EXPERTS, 2 * WIDTH, HIDDEN),
        w2_weight=random(EXPERTS, HIDDEN, WIDTH),
        forward_modular=forward_modular,
    )
    mlp = SimpleNamespace(
        gate_up_proj=SimpleNamespace(weight=random(2 * WIDTH, HIDDEN)),
        down_proj=SimpleNamespace(weight=random(HIDDEN, WIDTH)),
        activation=lambda x: torch.nn.functional.silu(x[:, :WIDTH]) * x[:, WIDTH:],
    )
    return SimpleNamespace(
        gate=gate,
        experts=SimpleNamespace(routed_experts=routed),
        shared_experts=mlp if shared else None,
        routed=torch.zeros(1, dtype=torch.int32),
        top_k=TOP_K,
        renormalize=True,
        scale=2.5,
    )


@pytest.mark.parametrize("experts_read", [True, False], ids=["experts read", "in another order"])
@pytest.mark.parametrize("shared", ["none", "read", "by its own layers"])
def test_decode(experts_read: bool, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way adds the same up: routed experts, and the shared one once."""
    mixture = layer(shared != "none")
    read = {"w13_weight": experts_read, "w2_weight": experts_read, "weight": shared == "read"}
    monkeypatch.setattr(moe, "weight_of", lambda of, name="weight": getattr(of, name) if read[name] else None)
    monkeypatch.setattr(moe, "linear", lambda x, of: x @ of.weight.T)
    monkeypatch.setattr(moe, "all_reduce", lambda x: x)  # of one rank
    monkeypatch.setattr(interface, "kernels", Mock(return_value=reference_with_turn()))
    x, residual = random(TOKENS, HIDDEN), random(TOKENS + 1, HIDDEN)[1:]
    norm = SimpleNamespace(weight=torch.ones(HIDDEN), variance_epsilon=1e-5)
    out, total = moe.MixtureOfExperts.decode(mixture, x, residual, norm)  # type: ignore[arg-type]

    normed, _, ids, weights, _ = reference.router(
        x, residual, norm.weight, 1e-5, mixture.gate.weight, mixture.gate.e_score_correction_bias, None,
        top_k=TOP_K, renormalize=True, scale=2.5,
    )  # fmt: skip
    expected = forward_modular(normed, weights, ids)
    if shared != "none":
        mlp = mixture.shared_experts
        expected = expected + mlp.activation(normed @ mlp.gate_up_proj.weight.T) @ mlp.down_proj.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, x + residual)


def reference_with_turn() -> SimpleNamespace:
    """`reference`, with the counter of programs that its GPU form takes."""

    def router(*args: Tensor, **options: object) -> tuple[Tensor, ...]:
        *first, _turn = args
        return reference.router(*first, **options)  # type: ignore[arg-type]

    return SimpleNamespace(router=router, experts=reference.experts)
