"""A decode step's token through a KDA layer, from the input projection to the gated output, gates' products included.

As `kda_kernels.cuda.decode` for few programs, the whole state of a head in the registers of one. The second factors of
the two gates and the state are loaded before the kernel in front has ended: the state was written a step ago, and
between two steps the GPU waits for all kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import rounded
from kda_kernels.cuda.decode import (
    VALUES_AT,
    _causal_conv1d,
    _gated_norm,
    _recurrent_step,
    _state_offsets,
    _store_conv_state,
    decode,
)
from kda_kernels.cuda.elementwise import LOG2E, sigmoid, softplus
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState

MANY = 128  # programs, beyond which the gates are a product of their own and a program has less in its registers


@triton.jit
def _low_rank(weight, low, D: tl.constexpr, DTYPE: tl.constexpr):
    """[D] of a gate from its second factor [D, D] and the first one's output, rounded as a product in DTYPE is."""
    value = tl.load(low + tl.arange(0, D)).to(tl.float32)
    return rounded(tl.sum(weight.to(tl.float32) * value[None, :], 1), DTYPE)


@triton.jit(do_not_specialize_on_alignment=["state_indices"])
def kda_gated_decode_kernel(
    projected, gates_b, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state, state_indices, out,
    projected_stride, conv_state_stride, conv_token_stride, recurrent_state_stride, norm_eps, heads,
    D: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, VALUES_AT: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    P, first = heads * D, head * D
    DTYPE: tl.constexpr = projected.dtype.element_ty
    channel = tl.arange(0, D)
    launch_next()
    matrix = gates_b + (first + channel)[:, None] * D + channel[None, :]
    f_b, g_b = tl.load(matrix), tl.load(matrix + P * D)
    bias = tl.load(dt_bias + first + channel).to(tl.float32)
    rate = tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E) * LOG2E
    norm = tl.load(norm_weight + channel).to(tl.float32)
    state_index = tl.load(state_indices + token).to(tl.int64)
    cell = recurrent_state + tl.maximum(state_index, 0) * recurrent_state_stride
    cell += first * D + _state_offsets(D, INNER, D, VALUES_AT)
    tile = tl.load(cell)
    wait_for_last()
    if state_index <= 0:
        tl.store(out + token * P + first + channel, tl.zeros([D], out.dtype.element_ty))
        return
    projected += token * projected_stride
    qkv, low = projected + first, projected + 3 * P + heads
    conv_state += state_index * conv_state_stride + first
    weight = conv_weight + first * W
    q = _causal_conv1d(qkv, conv_state, weight, 0, 0, conv_token_stride, D, W)
    k = _causal_conv1d(qkv + P, conv_state + P, weight + P * W, 0, 0, conv_token_stride, D, W)
    v = _causal_conv1d(qkv + 2 * P, conv_state + 2 * P, weight + 2 * P * W, 0, 0, conv_token_stride, D, W)
    alpha = tl.exp2(-rate * softplus(_low_rank(f_b, low, D, DTYPE) + bias))
    scale = sigmoid(_low_rank(g_b, low + D, D, DTYPE)) * norm
    b = sigmoid(tl.load(projected + 3 * P + head).to(tl.float32))
    for part in tl.static_range(3):
        window = conv_state + part * P
        _store_conv_state(qkv + part * P, window, window, 0, 0, conv_token_stride, D, W)
    o, tile = _recurrent_step(tile, cell, cell, q, k, v, alpha, b, D, INNER, D, VALUES_AT)
    _gated_norm(o, tl.reshape(scale, (1, D)), out + token * P + first, norm_eps, D, D)


def kda_decode(
    projected: Tensor, gates_b: Tensor, params: KdaParams, state: KdaState, state_indices: Tensor, **options: int
) -> Tensor:
    tokens, heads, dim = projected.shape[0], params.heads, params.head_dim
    out = projected.new_empty(tokens, heads * dim)
    if tokens * heads > MANY:
        qkv, beta, low = projected[:, : 3 * heads * dim + heads + 2 * dim].split(
            [3 * heads * dim, heads, 2 * dim], dim=1
        )
        g, output_gate = torch.bmm(low.unflatten(1, (2, -1)).transpose(0, 1), gates_b.transpose(1, 2))
        decode(DecodeArgs(KdaInputs(qkv, g, beta, output_gate), params, state, state_indices, out))
        return out
    options = {"num_warps": 8, "INNER": min(dim, 64)} | options
    kda_gated_decode_kernel[(heads, tokens)](
        *(projected, gates_b, params.conv_weight, params.A_log, params.dt_bias, params.norm_weight),
        *(state.conv, state.recurrent, state_indices, out),
        *(projected.stride(0), state.conv.stride(0), state.conv.stride(1), state.recurrent.stride(0)),
        *(params.norm_eps, heads),
        D=dim,
        W=params.conv_kernel_size,
        VALUES_AT=VALUES_AT,
        **options,
        **LAUNCH,
    )
    return out
