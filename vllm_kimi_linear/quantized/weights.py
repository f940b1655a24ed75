"""Weights as a quantised checkpoint stores them: the plain tensor they stand for, and what a CPU's kernels read."""

from collections.abc import Mapping

import torch

from decode_kernels.weights import QuantizedWeight
from vllm_kimi_linear.config.quantization import Scheme


def plain(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [N, K] in fp32 of its tensors by suffix."""
    values = parts[scheme.values]
    columns = values.shape[-1] * scheme.packed
    return quantized(scheme, values, row_scales(scheme, parts["weight_scale"], len(values)), columns).float()


def row_scales(scheme: Scheme, scales: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, G] in fp32, where the checkpoint may have one row of them for a block."""
    scales = scales.float()
    return scales.repeat_interleave(scheme.block[0], 0)[:rows] if scheme.block else scales


def quantized(scheme: Scheme, values: torch.Tensor, scales: torch.Tensor, columns: int) -> QuantizedWeight:
    """values [..., N, K / packed] as stored, scales [..., N, G] in fp32; `columns`: K."""
    group = scheme.group or (scheme.block[1] if scheme.block else 1 << max(columns - 1, 15).bit_length())
    if scheme.form == "packed8":  # 128 above their value
        values = (values.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
    return QuantizedWeight(values.contiguous(), scales.contiguous(), group)
