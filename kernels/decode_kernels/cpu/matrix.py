"""A weight as the C kernels take it: struct matrix of kda_kernels/cpu/rows.h."""

import torch

from decode_kernels.weights import QuantizedWeight, Weight

FIELDS = 6
NONE = (0,) * FIELDS
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3, torch.int32: 4}


def matrix(weight: Weight | None) -> tuple[int, ...]:
    """Of [N, K] with rows of any stride, or [experts, N, K], which is one below the other; all zeros for None."""
    if weight is None:
        return NONE
    if isinstance(weight, QuantizedWeight):
        values, scales = weight.values, weight.scales
        if weight.rows != 1 or scales.dtype != torch.float32:
            raise ValueError("a CPU's kernels take scales of each row, in float32")
        shift = weight.group.bit_length() - 1
        return values.data_ptr(), scales.data_ptr(), _KINDS[values.dtype], weight.shape[-1], scales.shape[-1], shift
    return weight.data_ptr(), 0, _KINDS[weight.dtype], weight.stride(-2), 0, 0
