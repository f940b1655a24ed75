"""What runs before the first request, so that none waits for a compiler."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from vllm.config import VllmConfig

from kda_kernels import interface
from kda_kernels.interface import KdaInputs, KdaParams
from vllm_kimi_linear import kda, warmup
from vllm_kimi_linear.warmup import ExpertWarmup, Step

HEADS, DIM = 2, 16
EXPERTS, TOP_K = 256, 8


@pytest.mark.parametrize("most", [1, 2, 20, 768, 7000, 16384])
def test_every_step_runs_kernels_of_experts_that_one_before_it_has_compiled(most: int) -> None:
    """Another table, an odd number of tokens (Triton: what 16 divides), or few (vLLM: not sorted) is another kernel."""
    config = Mock(spec=VllmConfig, scheduler_config=SimpleNamespace(max_num_batched_tokens=most), lora_config=None)
    steps = ExpertWarmup().get_warmup_keys(Mock(), config)
    tables = [1 << n for n in range(15)]

    def kernel(tokens: int) -> tuple[int, int, bool]:
        table = min(tables, key=lambda n: abs(n - tokens))  # as vLLM chooses it
        return table, tokens % 2, tokens * TOP_K * 4 <= EXPERTS

    assert {kernel(step.tokens) for step in steps} == {kernel(tokens) for tokens in range(1, most + 1)}
    assert len(steps) <= 4 * most.bit_length() + 2


def test_no_experts_are_warmed_up_with_adapters():
    """Outside a step their products read which adapter a token has from beyond what was written: an illegal access."""
    config = Mock(spec=VllmConfig, scheduler_config=SimpleNamespace(max_num_batched_tokens=20), lora_config=Mock())
    assert ExpertWarmup().get_warmup_keys(Mock(), config) == []


class Broken(torch.nn.Linear):
    error: type[Exception] = RuntimeError

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise self.error("broken")


def test_a_warmup_that_fails_costs_no_server_unless_the_device_or_another_rank_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warmup, "set_forward_context", lambda *args, **kwargs: nullcontext())
    model = Mock(dtype=torch.float32, get_hidden_size=lambda: 4)
    alone, several = (SimpleNamespace(world_size=ranks) for ranks in (1, 2))
    step = Step(2, layer := Broken(4, 4), Mock(spec=VllmConfig, model_config=model, parallel_config=alone))
    ExpertWarmup().compile(step)
    step.config.parallel_config = several
    with pytest.raises(RuntimeError, match="broken"):  # the others would wait for this rank's part for ever
        ExpertWarmup().compile(step)
    step.config.parallel_config = alone
    layer.error = torch.AcceleratorError
    with pytest.raises(torch.AcceleratorError):
        ExpertWarmup().compile(step)


def test_kda_decodes_one_token_and_many(monkeypatch: pytest.MonkeyPatch):
    """Where graphs of few tokens hold the decode step's kernels, nothing else compiles KDA's own for so few."""
    width = HEADS * DIM
    params = KdaParams(
        conv_weight=torch.zeros(3 * width, 4),
        A_log=torch.zeros(HEADS),
        dt_bias=torch.zeros(width),
        norm_weight=torch.zeros(DIM),
        norm_eps=1e-5,
    )
    layer = Mock(spec=kda.KimiDeltaAttention, kernel_params=params)
    layer.get_state_shape.return_value = (3, 3 * width), (HEADS, DIM, DIM)
    layer.get_state_dtype.return_value = torch.float32, torch.float32
    decoded = []
    monkeypatch.setattr(interface, "prefill", Mock())
    monkeypatch.setattr(interface, "decode", lambda args: decoded.append(args))
    rows = [torch.zeros(40, channels) for channels in (3 * width, width, HEADS, width)]
    kda.KimiDeltaAttention.warm_up(layer, KdaInputs(*rows), torch.zeros(40, width))
    assert [len(args.out) for args in decoded] == [1, 40]
    assert not any(args.state_indices.any() for args in decoded)  # the null state, which is neither read nor written
