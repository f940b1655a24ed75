"""Products of a decode step: by the decode kernels where they read a layer's weight, else by the layer's method."""

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from decode_kernels import interface
from decode_kernels.weights import QuantizedWeight, Weight
from vllm_kimi_linear.partial_sums import HiddenStates, add_parts

FEW_TOKENS = 2  # on a GPU the kernels are the faster ones for quantised weights up to so many


def weight_of(layer: nn.Module, name: str = "weight") -> Weight | None:
    """What the kernels read: the parameter, or what a quantised checkpoint has for it; None for what they do not."""
    if current_platform.is_cpu():
        found = getattr(layer, f"quantized_{name}", None)
        return getattr(layer, name) if found is None else found
    from vllm_kimi_linear.quantized.gpu import readable

    return readable(layer, name)


def linear(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """x [T, K] -> [T, N] of this rank, not reduced over ranks."""
    weight = _weight(layer, len(x))
    if weight is None:
        return layer.quant_method.apply(layer, x)
    return interface.kernels(x.device.type).linear(x, weight)


def norm_linear(
    x: HiddenStates, residual: torch.Tensor | None, norm: RMSNorm, layer: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, K] -> `linear` of the norm of x + residual; and x + residual."""
    x, residual, norm_weight = add_parts(x, residual, norm)
    if norm_weight is None:
        return linear(x, layer), residual
    weight = _weight(layer, len(x))
    if weight is None:
        normed, residual = (norm(x), x) if residual is None else norm(x, residual)
        return layer.quant_method.apply(layer, normed), residual
    return interface.kernels(x.device.type).norm_linear(x, residual, norm_weight, weight, norm.variance_epsilon)


def _weight(layer: nn.Module, tokens: int) -> Weight | None:
    weight = weight_of(layer)
    many = isinstance(weight, QuantizedWeight) and tokens > FEW_TOKENS and current_platform.is_cuda()
    return None if many else weight
