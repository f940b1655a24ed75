"""Mixture of experts on the CPU: by the C kernels, or one pair of packed oneDNN products for each expert in use.

Which one, `products.py` says. vLLM's portable grouped kernel reads expert weights at a fraction of the memory bandwidth
and multiplies at a fraction of oneDNN's rate on chips without AMX (docs/benchmarks/cpu.md has both). It runs where
there is neither. Routing, loading, sharding and the reduction over ranks stay vLLM's.
"""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import replace_parameter

from decode_kernels import interface
from vllm_kimi_linear.cpu.products import has_onednn, takes_c_kernels

# oneDNN compiles a product for each number of tokens it meets; that many are kept for each expert.
PRIMITIVES = 32


def use_fast_experts(runner: MoERunner) -> None:
    """Let unquantised experts of `runner` run on the best there is. Call it before the weights are processed."""
    layer = runner.routed_experts
    if isinstance(layer.quant_method, UnquantizedFusedMoEMethod):
        method = PackedExpertsMethod(layer.moe_config)
        if takes_c_kernels(layer.w13_weight.dtype):
            method.experts_cls = CExperts
        elif has_onednn(layer.w13_weight.dtype):
            method.experts_cls = OneDnnExperts
        runner._replace_quant_method(method)


class PackedExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's, but for a reload of weights, after which it goes on with those that were packed before."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.moe_kernel = None  # made anew, and packed, as at the first load
        super().process_weights_after_loading(layer)


class CExperts(CPUUnquantizedExperts):
    """Experts as `decode_kernels.reference.experts` has them, on weights as they are."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is packed."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *_: object,
        **__: object,
    ) -> None:
        """hidden_states [T, hidden], topk_weights and topk_ids [T, k] -> output [T, hidden]."""
        ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        output.copy_(interface.kernels("cpu").experts(hidden_states, w1, w2, ids, topk_weights))


class OneDnnExperts(CPUUnquantizedExperts):
    """Experts as w2(silu(w1 x) * w3 x), each a oneDNN product over the tokens routed to it, summed in fp32."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.gate_up = _pack(layer, "w13_weight")
        self.down = _pack(layer, "w2_weight")

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """hidden_states [T, hidden], topk_weights and topk_ids [T, k] -> output [T, hidden]."""
        tokens, choices = topk_ids.shape
        chosen = topk_ids.flatten().long()
        if expert_map is not None:
            chosen = expert_map[chosen].long()
        order = chosen.argsort(stable=True)
        inputs = hidden_states[order // choices]
        answers = torch.zeros_like(inputs)
        experts, counts = chosen[order].unique_consecutive(return_counts=True)
        first = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            routed = slice(first, first + count)
            first += count
            if expert < 0:  # another rank's
                continue
            gate_up = _custom_ops.onednn_mm(self.gate_up[expert], inputs[routed], None)
            hidden = gate_up.new_empty(count, gate_up.shape[1] // 2)
            torch.ops._C.silu_and_mul(hidden, gate_up)
            answers[routed] = _custom_ops.onednn_mm(self.down[expert], hidden, None)
        # Back to the order of the tokens, and summed over their choices.
        place = order.argsort().view(tokens, choices)
        total = torch.zeros(output.shape, dtype=torch.float32)
        for choice in range(choices):
            total += answers[place[:, choice]].float() * topk_weights[:, choice, None]
        output.copy_(total)


def _pack(layer: torch.nn.Module, name: str) -> list[_custom_ops.CPUDNNLGEMMHandler]:
    """Pack the parameter [experts, out, in] for oneDNN and free it; its shape stays, vLLM reads it."""
    weight = getattr(layer, name)
    packed = [_custom_ops.create_onednn_mm(expert.t(), PRIMITIVES) for expert in weight]
    replace_parameter(layer, name, weight.to("meta"))
    return packed
