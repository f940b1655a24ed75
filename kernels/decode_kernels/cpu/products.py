"""y = x W^T, with a residual's addition and a norm before it where there is one; the router and its choice."""

import struct

import torch
from torch import Tensor

from decode_kernels.cpu.matrix import NONE, matrix
from decode_kernels.weights import Weight
from kda_kernels.cpu.library import load

_CALL = struct.Struct("=37q2d")  # struct product_call of products.h
_library = load({"product": _CALL.size})
_isa = _library.kda_best_isa()
_ALIGNED = 16  # floats; rows of this length are read in whole vectors


def padded(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED


def linear(x: Tensor, weight: Weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N] in the dtype of x, or in `out_dtype`; fp32 or bf16, rows of any stride."""
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(len(x), len(weight), dtype=out_dtype or x.dtype)
    _multiply(x, weight, out)
    return out


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Weight, eps: float
) -> tuple[Tensor, Tensor]:
    """As `decode_kernels.reference.norm_linear`; the norm is rounded to the dtype of x."""
    out, total = x.new_empty(len(x), len(weight)), x if residual is None else torch.empty_like(x)
    _multiply(x, weight, out, residual=residual, norm_weight=norm_weight, total=total, eps=eps)
    return out, total


def router(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, gate: Tensor, bias: Tensor, shared: Weight | None,
    done: Tensor | None = None, *, top_k: int, renormalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `decode_kernels.reference.router`."""
    tokens, inner = len(x), 0 if shared is None else len(shared) // 2
    normed, total, logits = torch.empty_like(x), torch.empty_like(x), torch.empty(tokens, len(gate))
    ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
    acts = x.new_empty(tokens, inner)
    choice = (bias.data_ptr(), ids.data_ptr(), weights.data_ptr(), top_k, renormalize)
    pair = (*matrix(shared), acts.data_ptr(), inner)
    _multiply(
        x, gate, logits, residual=residual, norm_weight=norm_weight, total=total, normed=normed, pair=pair,
        choice=choice, eps=eps, scale=scale,
    )  # fmt: skip
    return normed, total, ids, weights, acts


def _multiply(
    x: Tensor, weight: Weight, out: Tensor, residual: Tensor | None = None, norm_weight: Tensor | None = None,
    total: Tensor | None = None, normed: Tensor | None = None, pair: tuple[int, ...] = (*NONE, 0, 0),
    choice: tuple[int, ...] = (0, 0, 0, 0, 0), eps: float = 0.0, scale: float = 1.0,
) -> None:  # fmt: skip
    tokens, width = x.shape
    bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    plain = not bf16 and norm_weight is None and width % _ALIGNED == 0
    wide = None if plain else torch.empty(tokens + threads, padded(width))
    call = _CALL.pack(
        *(x.data_ptr(), _at(residual), _at(norm_weight)),
        *(x.stride(0), 0 if residual is None else residual.stride(0)),
        *(0 if residual is None else _at(total), _at(normed), _at(wide), padded(width)),
        *matrix(weight),
        *(out.data_ptr(), out.stride(0), len(weight), out.dtype == torch.bfloat16),
        *pair,
        *choice,
        *(tokens, width, bf16, threads, _isa),
        *(eps, scale),
    )
    _library.kda_product(call)


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
