"""The two feed-forward blocks, thin over vLLM's layers: a gated MLP and a mixture of experts with a shared one."""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from decode_kernels import interface
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.decode_products import linear, norm_linear, weight_of
from vllm_kimi_linear.fused_moe_configs import use_tables
from vllm_kimi_linear.partial_sums import HiddenStates, add_parts, all_reduce
from vllm_kimi_linear.warmup import expert_warmup


class GatedMlp(nn.Module):
    """down(silu(gate x) * (up x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        plain: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, prefix=f"{prefix}.gate_up_proj", **plain
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, reduce_results=reduce_results, prefix=f"{prefix}.down_proj", **plain
        )
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)[0]))[0]

    def decode(
        self, hidden_states: HiddenStates, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[HiddenStates, torch.Tensor]:
        """`forward` behind the residual's addition and `norm`, in a step that `DecodeStep` takes; and the residual."""
        gate_up, residual = norm_linear(hidden_states, residual, norm, self.gate_up_proj)
        return all_reduce(linear(self.activation(gate_up), self.down_proj)), residual


class UnadaptedExperts(RoutedExperts):
    """vLLM's, chosen as without --enable-lora: adapters of experts are refused."""

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: FusedMoEConfig, *args: Any, **more: Any):
        moe_config.is_lora_enabled = False
        super().__init__(layer_name, params_dtype, moe_config, *args, **more)


class MixtureOfExperts(nn.Module):
    """Sigmoid routing in fp32: the top k of score + bias, weighted by the scores alone (docs/kda.md section 9)."""

    def __init__(self, sizes: ModelSizes, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        g, config = sizes, get_current_vllm_config()
        # A router that rounds its logits to bf16 sends tokens to other experts than the reference does.
        self.gate = GateLinear(
            g.hidden_size,
            g.num_experts,
            bias=False,
            out_dtype=torch.float32,
            force_fp32_compute=True,
            prefix=f"{prefix}.gate",
        )
        self.top_k, self.renormalize, self.scale = g.experts_per_token, g.renormalize, g.routed_scaling_factor
        self.gate.e_score_correction_bias = nn.Parameter(
            torch.empty(g.num_experts, dtype=torch.float32), requires_grad=False
        )
        self.shared_experts = None
        if g.shared_experts:
            self.shared_experts = GatedMlp(
                g.hidden_size,
                g.moe_intermediate_size * g.shared_experts,
                quant_config,
                f"{prefix}.shared_experts",
                reduce_results=False,
            )
        self.experts = FusedMoEFactory(
            num_experts=g.num_experts,
            top_k=g.experts_per_token,
            hidden_size=g.hidden_size,
            intermediate_size=g.moe_intermediate_size,
            renormalize=g.renormalize,
            use_grouped_topk=True,  # also with one group: this is the path that adds the bias
            num_expert_group=g.expert_groups,
            topk_group=g.topk_groups,
            scoring_func="sigmoid",
            routed_scaling_factor=g.routed_scaling_factor,
            e_score_correction_bias=self.gate.e_score_correction_bias,
            shared_experts=self.shared_experts,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            routed_experts_cls=UnadaptedExperts if config.lora_config is not None else None,
        )
        if current_platform.is_cpu():
            from vllm_kimi_linear.cpu.experts import use_fast_experts

            use_fast_experts(self.experts)
        use_tables(self.experts)
        self.register_buffer("routed", torch.zeros(1, dtype=torch.int32), persistent=False)  # of `decode`
        expert_warmup.register_warmup(self, config)

    @property
    def backend(self) -> str:
        """vLLM's name of what runs the experts, or of their quantisation's method."""
        method = self.experts.routed_experts.quant_method
        chosen = [getattr(method, f"{kind}_backend", None) for kind in ("unquantized", "fp8", "wna16")]
        return next((backend.value for backend in chosen if backend), type(method).__name__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(x)
        return self.experts(hidden_states=x, router_logits=router_logits)

    def decode(
        self, hidden_states: HiddenStates, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[HiddenStates, torch.Tensor]:
        """As `GatedMlp.decode`."""
        kernels = interface.kernels(residual.device.type)
        x, residual, norm_weight = add_parts(hidden_states, residual, norm)
        shared, routed = self.shared_experts, self.experts.routed_experts
        up, down = (None, None) if shared is None else map(weight_of, (shared.gate_up_proj, shared.down_proj))
        if up is None or down is None:  # the shared expert by its own layers, if there is one
            up = down = None
        rows = x, residual, norm_weight, norm.variance_epsilon
        gate = self.gate.weight, self.gate.e_score_correction_bias
        choice = {"top_k": self.top_k, "renormalize": self.renormalize, "scale": self.scale}
        normed, residual, ids, weights, shared_acts = kernels.router(*rows, *gate, up, self.routed, **choice)
        each_up, each_down = weight_of(routed, "w13_weight"), weight_of(routed, "w2_weight")
        if each_up is not None and each_down is not None:
            out = kernels.experts(normed, each_up, each_down, ids, weights, shared_acts, down)
        else:  # in the order of vLLM's kernel
            out = routed.forward_modular(normed, weights, ids)
            if shared is not None and up is not None:
                out = out + linear(shared_acts, shared.down_proj)
        if shared is not None and up is None:
            out = out + linear(shared.activation(linear(normed, shared.gate_up_proj)), shared.down_proj)
        return all_reduce(out), residual
