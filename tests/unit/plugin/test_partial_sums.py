"""Ranks' parts of a sum, added where the next norm is, against an all-reduce before it."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from vllm.platforms import current_platform

from decode_kernels import interface, reference
from vllm_kimi_linear import decode_products, moe, partial_sums
from vllm_kimi_linear.partial_sums import PartialSums

TOKENS, HIDDEN, EXPERTS = 3, 32, 6
WORKSPACE: Any = object()
NORM: Any = SimpleNamespace(weight=torch.linspace(0.5, 1.5, HIDDEN), variance_epsilon=1e-5)


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.fixture(autouse=True)
def two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_norm(own: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Any) -> tuple[Tensor, Tensor]:
        assert workspace is WORKSPACE
        return reference.all_reduce_add_norm([own, own], residual, weight, eps)

    def router(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        *first, _turn = args
        return reference.router(*first, **options)

    kernels = SimpleNamespace(
        all_reduce_add_norm=add_norm,
        router=router,
        experts=reference.experts,
        linear=reference.linear,
        norm_linear=reference.norm_linear,
    )
    monkeypatch.setattr(interface, "kernels", lambda device: kernels)
    monkeypatch.setattr(partial_sums, "_workspace", WORKSPACE)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)


def test_a_product_behind_the_norm() -> None:
    whole, residual, layer = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN + 1)[:, 1:], Mock(weight=random(20, HIDDEN))
    layer.quantized_weight = None
    found, total = decode_products.norm_linear(PartialSums(whole / 2), residual, NORM, layer)
    wanted, right = decode_products.norm_linear(whole, residual, NORM, layer)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(total, right)


def test_experts_behind_the_norm() -> None:
    mixture: Any = SimpleNamespace(
        gate=SimpleNamespace(weight=random(EXPERTS, HIDDEN), e_score_correction_bias=torch.zeros(EXPERTS)),
        experts=SimpleNamespace(
            routed_experts=SimpleNamespace(w13_weight=random(EXPERTS, 16, HIDDEN), w2_weight=random(EXPERTS, HIDDEN, 8))
        ),
        shared_experts=None,
        routed=None,
        top_k=2,
        renormalize=True,
        scale=2.0,
    )
    whole, residual = random(TOKENS, HIDDEN), random(TOKENS + 1, HIDDEN)[1:]
    found, total = moe.MixtureOfExperts.decode(mixture, PartialSums(whole / 2), residual, NORM)
    wanted, right = moe.MixtureOfExperts.decode(mixture, whole, residual, NORM)
    assert isinstance(found, PartialSums) and isinstance(wanted, PartialSums)
    torch.testing.assert_close(found.own, wanted.own)
    torch.testing.assert_close(total, right)


def test_when_ranks_add_their_parts_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM's custom all-reduce reaches the others' memory, one stage, and steps on our kernels."""
    pytest.importorskip("triton")
    shared = Mock(return_value=[4096, 8192])
    group: Any = SimpleNamespace(world_size=2, rank_in_group=1, cpu_group=None, device="cpu")
    group.device_communicator = SimpleNamespace(ca_comm=Mock(disabled=False, create_shared_buffer=shared))
    monkeypatch.setattr(partial_sums, "get_tp_group", lambda: group)

    def prepared(kda_layer: str | None = "0", stages: int = 1, asked: bool = True, sleeps: bool = False) -> Any:
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
            additional_config={"fused_all_reduce": asked},
            model_config=SimpleNamespace(dtype=torch.bfloat16, enable_sleep_mode=sleeps),
        )
        sizes: Any = SimpleNamespace(hidden_size=HIDDEN)
        partial_sums.prepare(config, sizes, Mock(kda_layer=kda_layer))
        return partial_sums._workspace

    workspace = prepared()
    assert workspace.rank == 1 and workspace.buffers.tolist() == [4096, 8192] and not workspace.calls.any()
    (size,), _ = shared.call_args
    assert size == 2 * 2 * len(workspace.calls) * 2 * HIDDEN * 2
    assert prepared(kda_layer=None) is prepared(stages=2) is prepared(asked=False) is prepared(sleeps=True) is None
    group.device_communicator.ca_comm.disabled = True
    assert prepared() is None
    group.device_communicator.ca_comm = None
    assert prepared() is None
    group.world_size = 1
    assert prepared() is None
