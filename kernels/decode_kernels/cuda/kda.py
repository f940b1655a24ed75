"""A decode step's token through a KDA layer, from the input projection to the gated output, gates' products included.

As `kda_kernels.cuda.decode` for few programs, the whole state of a head in the registers of one. The second factors of
the two gates, the state and the convolution's window are loaded before the kernel in front has ended: states were
written a step ago, and between two steps the GPU waits for all kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import rounded
from kda_kernels.cuda.decode import (
    VALUES_AT,
    _gated_norm,
    _recurrent_step,
    _state_offsets,
    decode,
)
from kda_kernels.cuda.elementwise import LOG2E, sigmoid, silu, softplus
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState

MANY = 128  # programs, beyond which the gates are a product of their own and a program has less in its registers


@triton.jit
def _low_rank(weight, low, D: tl.constexpr, DTYPE: tl.constexpr):
    """[D] of a gate from its second factor [D, D] and the first one's output, rounded as a product in DTYPE is."""
    value = tl.load(low + tl.arange(0, D)).to(tl.float32)
    return rounded(tl.sum(weight.to(tl.float32) * value[None, :], 1), DTYPE)


@triton.jit
def _window(conv_state, weight, conv_token_stride, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """Of D channels: the convolution's old inputs [WP, D], what they add to its output, the new input's weights."""
    channel, tap = tl.arange(0, D), tl.arange(0, WP)[:, None]
    old = tl.load(conv_state + tap * conv_token_stride + channel[None, :], mask=tap < W - 1, other=0.0)
    factors = tl.load(weight + channel[None, :] * W + tap, mask=tap < W - 1, other=0.0)
    last = tl.load(weight + channel * W + W - 1).to(tl.float32)
    return old, tl.sum(old.to(tl.float32) * factors.to(tl.float32), 0), last


@triton.jit
def _shift(conv_state, old, new, conv_token_stride, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """The window without its oldest input, and with a new one."""
    channel, tap = tl.arange(0, D), tl.arange(0, WP)[:, None]
    cell = conv_state + (tap - 1) * conv_token_stride + channel[None, :]
    tl.store(cell, old, mask=(tap > 0) & (tap < W - 1))
    tl.store(conv_state + (W - 2) * conv_token_stride + channel, new)


@triton.jit(do_not_specialize_on_alignment=["state_indices"])
def kda_gated_decode_kernel(
    projected, gates_b, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state, state_indices, out,
    projected_stride, conv_state_stride, conv_token_stride, recurrent_state_stride, norm_eps, heads,
    D: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, VALUES_AT: tl.constexpr,
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
    own = tl.maximum(state_index, 0)
    cell = recurrent_state + own * recurrent_state_stride + first * D + _state_offsets(D, INNER, D, VALUES_AT)
    tile = tl.load(cell)
    conv_state += own * conv_state_stride + first
    conv_weight += first * W
    q_old, q, q_last = _window(conv_state, conv_weight, conv_token_stride, D, W, WP)
    k_old, k, k_last = _window(conv_state + P, conv_weight + P * W, conv_token_stride, D, W, WP)
    v_old, v, v_last = _window(conv_state + 2 * P, conv_weight + 2 * P * W, conv_token_stride, D, W, WP)
    wait_for_last()
    if state_index <= 0:
        tl.store(out + token * P + first + channel, tl.zeros([D], out.dtype.element_ty))
        return
    projected += token * projected_stride
    low, new = projected + 3 * P + heads, projected + first + channel
    q_new, k_new, v_new = tl.load(new), tl.load(new + P), tl.load(new + 2 * P)
    q = silu(q + q_new.to(tl.float32) * q_last)
    k = silu(k + k_new.to(tl.float32) * k_last)
    v = silu(v + v_new.to(tl.float32) * v_last)
    alpha = tl.exp2(-rate * softplus(_low_rank(f_b, low, D, DTYPE) + bias))
    scale = sigmoid(_low_rank(g_b, low + D, D, DTYPE)) * norm
    b = sigmoid(tl.load(projected + 3 * P + head).to(tl.float32))
    _shift(conv_state, q_old, q_new, conv_token_stride, D, W, WP)
    _shift(conv_state + P, k_old, k_new, conv_token_stride, D, W, WP)
    _shift(conv_state + 2 * P, v_old, v_new, conv_token_stride, D, W, WP)
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
        WP=triton.next_power_of_2(params.conv_kernel_size),
        VALUES_AT=VALUES_AT,
        **options,
        **LAUNCH,
    )
    return out
