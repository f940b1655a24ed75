"""Quantised checkpoints on a CPU: weights stay as they are stored, and the C kernels widen them as they read.

vLLM's own methods for a CPU need AVX-512 or AMX, or are missing for experts; these run on every processor, with
activations of the model's dtype, which are not rounded to fewer bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from decode_kernels import interface
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import held_as
from vllm_kimi_linear.config.quantization import FIELD, Scheme
from vllm_kimi_linear.quantized.weights import quantized

VALUES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "packed4": torch.int32, "packed8": torch.int32}


class CpuQuantization(CompressedTensorsConfig):
    """vLLM's for these checkpoints, but for the methods of layers: they are ours, as `held_as` says."""

    def __init__(self, model_sizes: ModelSizes) -> None:
        super().__init__({}, [], "")
        try:
            interface.kernels("cpu")
        except ImportError as error:
            raise ConfigError(
                f"{FIELD} needs the C kernels: install a C compiler, then this package again ({error})"
            ) from None
        self.held_as = held_as(model_sizes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        experts = isinstance(layer, RoutedExperts)
        scheme = self.held_as.get(f"{prefix}.routed_experts.w13_weight" if experts else f"{prefix}.weight")
        if experts:
            moe = layer.moe_config
            return UnquantizedFusedMoEMethod(moe) if scheme is None else QuantizedExperts(scheme, moe)
        if isinstance(layer, LinearBase | ParallelLMHead):
            plain = UnquantizedLinearMethod if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod
            return plain() if scheme is None else QuantizedLinear(scheme)
        return None


class QuantizedLinear(LinearMethodBase):
    """x [..., K] -> [..., N] with a `QuantizedWeight`, which the layer has as `quantized_weight`."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **attributes: Any,
    ) -> None:
        self.columns = input_size_per_partition
        for name, parameter in _empty(self.scheme, sum(output_partition_sizes), self.columns).items():
            layer.register_parameter(name, parameter)
            split = {"input_dim": 1} if parameter.shape[1] > 1 else {}
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": weight_loader, **split, **attributes})
        layer.weight_scale.has_row_scales = True

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        values = getattr(layer, self.scheme.values)
        layer.quantized_weight = quantized(self.scheme, values.data, layer.weight_scale.data, self.columns)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = interface.kernels("cpu").linear(x.reshape(-1, x.shape[-1]), layer.quantized_weight)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


class QuantizedExperts(FusedMoEMethodBase):
    """As `decode_kernels.reference.experts`, with the layer's `quantized_w13_weight` and `quantized_w2_weight`."""

    def __init__(self, scheme: Scheme, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.scheme = scheme

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self.sizes = {"w13": (2 * intermediate_size_per_partition, hidden_size)}
        self.sizes["w2"] = (hidden_size, intermediate_size_per_partition)
        for name, (rows, columns) in self.sizes.items():
            for suffix, one in _empty(self.scheme, rows, columns).items():
                parameter = nn.Parameter(one.data.new_zeros(num_experts, *one.shape), requires_grad=False)
                layer.register_parameter(f"{name}_{suffix}", parameter)
                set_weight_attrs(parameter, {"weight_loader": partial(self._load, layer), "has_row_scales": True})

    def _load(
        self, layer: nn.Module, parameter: nn.Parameter, tensor: torch.Tensor, name: str, shard_id: str, expert_id: int
    ) -> None:
        """w1 and w3 [inner, K] -> their half of w13, w2 [N, inner]; of a rank's part of inner."""
        rank = layer.moe_config.moe_parallel_config.tp_rank
        own = parameter.data[expert_id]
        if shard_id != "w2":
            own = own.chunk(2)[shard_id == "w3"]
        for dim in (0, 1):
            if tensor.shape[dim] != own.shape[dim]:
                tensor = tensor.narrow(dim, rank * own.shape[dim], own.shape[dim])
        own.copy_(tensor)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for name in ("w13", "w2"):
            values = getattr(layer, f"{name}_{self.scheme.values}").data
            scales = getattr(layer, f"{name}_weight_scale").data
            setattr(layer, f"quantized_{name}_weight", quantized(self.scheme, values, scales, self.sizes[name][1]))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: object,
        **__: object,
    ) -> torch.Tensor:
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        up, down = layer.quantized_w13_weight, layer.quantized_w2_weight
        return interface.kernels("cpu").experts(x, up, down, ids, topk_weights)


def _empty(scheme: Scheme, rows: int, columns: int) -> dict[str, nn.Parameter]:
    """Values and scales, by name, of a weight [rows, columns], all zeros: rows that pad a layer stay so."""
    tensors = scheme.tensors(rows, columns)
    (stored, _), ((_, groups), _) = tensors[scheme.values], tensors["weight_scale"]
    values = torch.zeros(stored, dtype=VALUES[scheme.form])
    scales = torch.zeros(rows, groups, dtype=torch.float32)  # whatever the dtype of the model
    parts = {scheme.values: values, "weight_scale": scales}
    return {name: nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
