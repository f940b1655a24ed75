"""The experts of a few tokens: gate and up with SiLU, then down with the shared expert, weighted and summed.

A slot is one of the TOP_K choices of one token. Programs that multiply the same rows for different slots run side by
side: where two tokens chose one expert, its rows come from memory once and from the second cache once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import dot_rows, load_rows, load_vector, product, split
from kda_kernels.cuda.elementwise import silu


@triton.jit
def experts_up_kernel(
    x, up_weight, ids, out,
    K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, INTER: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    launch_next()
    wait_for_last()
    expert = tl.load(ids + slot)
    weight = up_weight + expert.to(tl.int64) * (2 * INTER * K)
    g_head, g_tail = load_rows(weight, row, INTER, K, HEAD, TAIL)
    u_head, u_tail = load_rows(weight + INTER * K, row, INTER, K, HEAD, TAIL)
    head, tail = load_vector(x + (slot // TOP_K) * K, K, HEAD, TAIL)
    gate, up = dot_rows(g_head, g_tail, head, tail), dot_rows(u_head, u_tail, head, tail)
    value = silu(gate) * up
    tl.store(out + slot * INTER + row, value.to(out.dtype.element_ty), mask=row < INTER)


@triton.jit
def experts_down_kernel(
    acts, down_weight, ids, weights, shared_acts, shared_weight, out,
    N: tl.constexpr, INTER: tl.constexpr, INTER_P: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, TOP_K: tl.constexpr,
    TOP_KP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    i, at, s = tl.arange(0, TOP_KP), tl.arange(0, INTER_P), tl.arange(0, SP)
    launch_next()
    if S > 0:
        own = (row[:, None] < N) & (s[None, :] < S)
        shared = tl.load(shared_weight + row[:, None] * S + s[None, :], mask=own, other=0.0)
    wait_for_last()
    chosen, slot = i < TOP_K, token * TOP_K + i
    expert = tl.load(ids + slot, mask=chosen, other=0).to(tl.int64)
    cell = down_weight + expert[:, None, None] * (N * INTER) + row[None, :, None] * INTER + at[None, None, :]
    inside = chosen[:, None, None] & (row[None, :, None] < N) & (at[None, None, :] < INTER)
    tile = tl.load(cell, mask=inside, other=0.0)
    weight = tl.load(weights + slot, mask=chosen, other=0.0)
    act = tl.load(acts + slot[:, None] * INTER + at[None, :], mask=chosen[:, None] & (at[None, :] < INTER), other=0.0)
    act = act.to(tl.float32) * weight[:, None]
    y = tl.sum(tl.sum(product(tile.to(tl.float32), act[:, None, :]), 2), 0)
    if S > 0:
        own_act = tl.load(shared_acts + token * S + s, mask=s < S, other=0.0).to(tl.float32)
        y += tl.sum(product(shared.to(tl.float32), own_act[None, :]), 1)
    tl.store(out + token * N + row, y.to(out.dtype.element_ty), mask=row < N)


def experts(
    x: Tensor, up_weight: Tensor, down_weight: Tensor, ids: Tensor, weights: Tensor, shared_acts: Tensor,
    shared_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    return experts_down(experts_up(x, up_weight, ids), down_weight, ids, weights, shared_acts, shared_weight)


def experts_up(x: Tensor, up_weight: Tensor, ids: Tensor, **tile: int) -> Tensor:
    (tokens, K), (_, twice, _), top_k = x.shape, up_weight.shape, ids.shape[1]
    width, slots = twice // 2, tokens * top_k
    tile = {"BN": 8, "num_warps": 4} | tile
    out = x.new_empty(slots, width)
    experts_up_kernel[(slots, triton.cdiv(width, tile["BN"]))](
        x, up_weight, ids, out, K, *split(K), width, top_k, **tile, **LAUNCH
    )
    return out


def experts_down(
    acts: Tensor, down_weight: Tensor, ids: Tensor, weights: Tensor, shared_acts: Tensor, shared_weight: Tensor | None,
    **tile: int,
) -> Tensor:  # fmt: skip
    (tokens, top_k), (_, N, width) = ids.shape, down_weight.shape
    shared = 0 if shared_weight is None else shared_weight.shape[1]
    tile = {"BN": 2, "num_warps": 2 if tokens < 4 else 4} | tile
    out = acts.new_empty(tokens, N)
    experts_down_kernel[(tokens, triton.cdiv(N, tile["BN"]))](
        *(acts, down_weight, ids, weights, shared_acts, down_weight if shared_weight is None else shared_weight, out),
        *(N, width, triton.next_power_of_2(width), shared, max(16, triton.next_power_of_2(shared))),
        *(top_k, triton.next_power_of_2(top_k)),
        **tile,
        **LAUNCH,
    )
    return out
