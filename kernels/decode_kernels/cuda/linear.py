"""y = x W^T for a few tokens, with the residual's addition and the RMS norm before it where there is one.

A program has BN rows of W in registers before the kernel in front has ended, and multiplies every token with them.
For one token every program computes the norm anew, from L2: a launch less is worth more. With more tokens the norm is a
launch of its own, and from MANY on cuBLAS is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import add, load_vector, rms_scale, split, store_vector
from decode_kernels.cuda.weights import PLAIN, load_weight, multiply, stored
from decode_kernels.weights import QuantizedWeight, Weight

MANY = 3  # tokens


@triton.jit
def linear_kernel(
    x, residual, norm_weight, weight, scales, y, new_residual, x_stride, residual_stride, y_stride, eps,
    FORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BN
    row = start + tl.arange(0, BN)
    launch_next()
    w_head, w_tail = load_weight(weight, row, N, K, HEAD, TAIL, FORM)
    if NORM:
        n_head, n_tail = load_vector(norm_weight, K, HEAD, TAIL)
    wait_for_last()
    for token in tl.static_range(TOKENS):
        head, tail = add(x + token * x_stride, residual + token * residual_stride, K, HEAD, TAIL, ADD)
        if NORM:
            out = multiply(
                w_head, w_tail, head * n_head, tail * n_tail, scales, start, row, N, K, HEAD, TAIL, FORM, GROUP
            )
            out *= rms_scale(head, tail, eps, K)
            if tl.program_id(0) == 0:
                store_vector(new_residual + token * K, head, tail, K, HEAD, TAIL)
        else:
            out = multiply(w_head, w_tail, head, tail, scales, start, row, N, K, HEAD, TAIL, FORM, GROUP)
        tl.store(y + token * y_stride + row, out.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def add_norm_kernel(
    x, residual, norm_weight, y, new_residual, x_stride, residual_stride, eps,
    K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    launch_next()
    n_head, n_tail = load_vector(norm_weight, K, HEAD, TAIL)
    wait_for_last()
    head, tail = add(x + token * x_stride, residual + token * residual_stride, K, HEAD, TAIL, ADD)
    scale = rms_scale(head, tail, eps, K)
    store_vector(new_residual + token * K, head, tail, K, HEAD, TAIL)
    store_vector(y + token * K, head * scale * n_head, tail * scale * n_tail, K, HEAD, TAIL)


def add_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tokens, K = x.shape
    y, new_residual = (x.new_empty(tokens, K) for _ in range(2))
    other = x if residual is None else residual
    add_norm_kernel[(tokens,)](
        *(x, other, norm_weight, y, new_residual, x.stride(0), other.stride(0), eps),
        *(K, *split(K), residual is not None),
        num_warps=4,
        **LAUNCH,
    )
    return y, new_residual


def linear(x: Tensor, weight: Weight, **tile: int) -> Tensor:
    tokens, (N, K) = x.shape[0], weight.shape
    if tokens >= MANY and not isinstance(weight, QuantizedWeight):
        return torch.nn.functional.linear(x, weight)
    values, scales, *form = stored(weight, x)
    y = x.new_empty(tokens, N)
    tile = (_tile(K, 4) if form[0] == PLAIN.value else _tile(K, 8)) | tile
    linear_kernel[(triton.cdiv(N, tile["BN"]),)](
        *(x, x, x, values, scales, y, y, x.stride(0), x.stride(0), y.stride(0), 0.0),
        *(*form, tokens, N, K, *split(K)),
        NORM=False,
        ADD=False,
        **tile,
        **LAUNCH,
    )
    return y


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Weight, eps: float, **tile: int
) -> tuple[Tensor, Tensor]:
    tokens, (N, K) = x.shape[0], weight.shape
    values, scales, *form = stored(weight, x)
    if tokens > 1:
        normed, new_residual = add_norm(x, residual, norm_weight, eps)
        return linear(normed, weight, **tile), new_residual
    y, new_residual = x.new_empty(tokens, N), x.new_empty(tokens, K)
    tile = (_tile(K, 2) if form[0] == PLAIN.value else _tile(K, 4, 65536)) | tile
    other = x if residual is None else residual
    linear_kernel[(triton.cdiv(N, tile["BN"]),)](
        *(x, other, norm_weight, values, scales, y, new_residual, x.stride(0), other.stride(0), y.stride(0), eps),
        *(*form, tokens, N, K, *split(K)),
        NORM=True,
        ADD=residual is not None,
        **tile,
        **LAUNCH,
    )
    return y, new_residual


def _tile(K: int, num_warps: int, elements: int = 16384) -> dict[str, int]:
    """Four rows of a few thousand weights, as many as these elements make of other lengths."""
    return {"BN": max(1, min(16, elements // triton.next_power_of_2(K))), "num_warps": num_warps}
