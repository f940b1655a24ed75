"""Quantised weights on a GPU: vLLM's own methods, those of compressed-tensors asked by the names of our parameters.

vLLM finds how a layer is stored by the names of its parts, which it knows of its own models' fused layers, and by the
name of its class. Our fused layers have other parts, some of them plain by `held_as`, so it is looked up here.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from decode_kernels.weights import QuantizedWeight, Weight
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import held_as, parameter_of

BLOCK = 128  # rows and columns that share a scale


class OnlineQuantization(OnlineQuantizationConfig):
    """`theirs`, with experts left in the order of the checkpoint, as the decode kernels read them."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts) and layer.moe_config.moe_backend == "auto":
            layer.moe_config.moe_backend = "triton"
        return super().get_quant_method(layer, prefix)


class GpuQuantization(CompressedTensorsConfig):
    """`theirs`, as vLLM read it from config.json, for the parameters of this model."""

    def __init__(self, theirs: CompressedTensorsConfig, model_sizes: ModelSizes) -> None:
        super().__init__(theirs.target_scheme_map, theirs.ignore, theirs.quant_format, config=theirs.config)
        quantization = model_sizes.quantization
        assert quantization is not None
        held, self.targets = held_as(model_sizes, "cuda"), dict[str, str | None]()
        for weight in tensors.weights(model_sizes):
            parameter, _ = parameter_of(weight, model_sizes)
            if weight.linear_layer is not None and held[parameter] is not None:
                self.targets[parameter] = quantization.target(weight.linear_layer)

    def get_scheme_dict(self, layer: nn.Module, layer_name: str | None = None) -> dict[str, Any] | None:
        name = f"{layer_name}.weight"
        if isinstance(layer, RoutedExperts):  # the name of one expert's part
            name = f"{str(layer_name).rpartition('.experts')[0]}.experts.routed_experts.w13_weight"
        target = self.targets.get(name)
        return None if target is None else self.target_scheme_map[target]


def readable(layer: nn.Module, name: str) -> Weight | None:
    """A weight of one of vLLM's layers as the decode kernels take it; None where it is stored in another order.

    name: "weight" of a linear layer, "w13_weight" or "w2_weight" of experts.
    """
    values, scales = getattr(layer, name, None), getattr(layer, f"{name}_scale", None)
    if values is None or scales is None:
        return values
    if values.dtype == torch.float8_e4m3fn:
        values = values if values.is_contiguous() else values.transpose(-1, -2)
    elif values.dtype == torch.uint8:  # two 4-bit integers each
        values = values.view(torch.int32)
    else:
        return None
    *outer, rows, columns = values.shape
    columns *= 8 if values.dtype == torch.int32 else 1
    if scales.numel() == values.numel() // (rows * columns) and values.dtype != torch.int32:
        scales, group, shared = scales.view(*outer, 1, 1), 1 << max(columns - 1, 15).bit_length(), max(rows, 2)
    elif scales.shape == (*outer, rows, 1):
        group, shared = 1 << max(columns - 1, 15).bit_length(), 1
    elif values.dtype == torch.int32:
        group, shared = columns // scales.shape[-1], 1
    else:
        group, shared = BLOCK, BLOCK
    try:
        return QuantizedWeight(values.data, scales.data, group, shared)
    except ValueError:
        return None
