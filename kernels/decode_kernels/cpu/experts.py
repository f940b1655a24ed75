"""The weighted sum of the experts that each token chose, and the second half of a shared one."""

import struct

import torch
from torch import Tensor

from decode_kernels.cpu.matrix import matrix
from decode_kernels.cpu.products import padded
from decode_kernels.weights import Weight
from kda_kernels.cpu.library import load

_CALL = struct.Struct("=42q")  # struct experts_call of products.h
_library = load({"experts": _CALL.size})
_isa = _library.kda_best_isa()
_TOKENS = 1024  # at a time, so that scratch memory stays small


def experts(
    x: Tensor, up_weight: Weight, down_weight: Weight, ids: Tensor, weights: Tensor, shared_acts: Tensor | None = None,
    shared_weight: Weight | None = None,
) -> Tensor:  # fmt: skip
    """As `decode_kernels.reference.experts`, for any number of tokens; ids below 0 are another rank's, and add nothing.

    A token's experts are summed in the order of their numbers, so that the sum does not depend on the order of ids.
    """
    out, ids, weights = x.new_empty(len(x), down_weight.shape[1]), ids.int().contiguous(), weights.float().contiguous()
    for first in range(0, len(x), _TOKENS):
        part = slice(first, first + _TOKENS)
        acts = None if shared_weight is None or shared_acts is None else shared_acts[part]
        _some(x[part], up_weight, down_weight, ids[part], weights[part], acts, shared_weight, out[part])
    return out


def _some(
    x: Tensor, up_weight: Weight, down_weight: Weight, ids: Tensor, weights: Tensor, shared_acts: Tensor | None,
    shared_weight: Weight | None, out: Tensor,
) -> None:  # fmt: skip
    (tokens, width), (experts, twice, _), top_k = x.shape, up_weight.shape, ids.shape[1]
    inner = twice // 2
    shared = 0 if shared_weight is None else shared_weight.shape[1]
    scratch = {
        "wide": torch.empty(tokens, padded(width)),
        "acts": torch.empty(tokens * top_k, padded(inner)),
        "shared_wide": torch.empty(tokens, padded(shared)),
        "total": torch.empty(tokens, width),
        "order": torch.empty(tokens * top_k, dtype=torch.int32),
        "first": torch.empty(experts + 1, dtype=torch.int32),
    }
    call = _CALL.pack(
        *(x.data_ptr(), x.stride(0), *matrix(up_weight), *matrix(down_weight), *matrix(shared_weight)),
        *(ids.data_ptr(), weights.data_ptr(), 0 if shared_acts is None else shared_acts.data_ptr()),
        *(out.data_ptr(), *(y.data_ptr() for y in scratch.values())),
        *(padded(width), padded(inner), padded(shared)),
        *(tokens, width, inner, shared, experts, top_k, x.dtype == torch.bfloat16),
        *(torch.get_num_threads(), _isa),
    )
    _library.kda_experts(call)
