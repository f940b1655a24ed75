"""The experts of a few tokens: gate and up with SiLU, then down with the shared expert, weighted and summed.

A slot is one of the TOP_K choices of one token. Programs that multiply the same rows for different slots run side by
side: where two tokens chose one expert, its rows come from memory once and from the second cache once more.
HALVES multiplies weights of eight bits in fp16 (`vectors.sum_in_halves`), with a quarter fewer instructions.
"""

import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import load_vector, product, scale_below_two, split, sum_in_halves
from decode_kernels.cuda.weights import (
    ABOVE,
    BLOCK,
    BLOCK_SCALES,
    ONE_SCALE,
    PACKED,
    PLAIN,
    ROW_SCALES,
    load_weight,
    multiply,
    stored,
    unpack,
)
from decode_kernels.weights import Weight
from kda_kernels.cuda.elementwise import silu

EIGHT_BITS = (ROW_SCALES.value, BLOCK_SCALES.value, ONE_SCALE.value)
_DOWN = {form: {"BN": 8, "num_warps": 4} for form in EIGHT_BITS}
_DOWN |= {PLAIN.value: {"BN": 2, "num_warps": 4}, PACKED.value: {"BN": 8, "num_warps": 8}}


@triton.jit
def experts_up_kernel(
    x, up_weight, up_scales, ids, out,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, INTER: tl.constexpr, TOP_K: tl.constexpr, HALVES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    start = tl.program_id(1) * BN
    row = start + tl.arange(0, BN)
    launch_next()
    wait_for_last()
    expert = tl.load(ids + slot).to(tl.int64)
    STORED: tl.constexpr = K // 8 if FORM == PACKED else K  # elements of a row
    weight, scales = up_weight + expert * (2 * INTER * STORED), up_scales + expert * SCALES
    HALF: tl.constexpr = SCALES // 2  # none of one
    g_head, g_tail = load_weight(weight, row, INTER, K, HEAD, TAIL, FORM)
    u_head, u_tail = load_weight(weight + INTER * STORED, row, INTER, K, HEAD, TAIL, FORM)
    head, tail = load_vector(x + (slot // TOP_K) * K, K, HEAD, TAIL)
    gate = multiply(g_head, g_tail, head, tail, scales, start, row, INTER, K, HEAD, TAIL, FORM, GROUP, HALVES)
    up = multiply(u_head, u_tail, head, tail, scales + HALF, start, row, INTER, K, HEAD, TAIL, FORM, GROUP, HALVES)
    value = silu(gate) * up
    tl.store(out + slot * INTER + row, value.to(out.dtype.element_ty), mask=row < INTER)


@triton.jit
def _chosen_rows(
    acts, down_weight, scales, slot, expert, chosen, weight, start, row,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, N: tl.constexpr, INTER: tl.constexpr,
    INTER_P: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The weighted sum of rows `row` [BN] of the experts [TOP_KP] times the activations of their slots: [BN]."""
    STORED: tl.constexpr = INTER // 8 if FORM == PACKED else INTER
    at, there = tl.arange(0, INTER_P), tl.arange(0, INTER_P // 8 if FORM == PACKED else INTER_P)
    cell = down_weight + expert[:, None, None] * (N * STORED) + row[None, :, None] * STORED + there[None, None, :]
    inside = chosen[:, None, None] & (row[None, :, None] < N) & (there[None, None, :] < STORED)
    tile = tl.load(cell, mask=inside, other=0.0)
    own = chosen[:, None] & (at[None, :] < INTER)
    act = tl.load(acts + slot[:, None] * INTER + at[None, :], mask=own, other=0.0).to(tl.float32) * weight[:, None]
    if FORM == PACKED:
        T: tl.constexpr = tile.shape[0]
        BN: tl.constexpr = tile.shape[1]
        GROUPS: tl.constexpr = INTER_P // GROUP
        sums = tl.sum(tl.reshape(product(unpack(tile), act[:, None, :]), [T, BN, GROUPS, GROUP]), 3)
        totals = tl.sum(tl.reshape(act, [T, GROUPS, GROUP]), 2)
        group = tl.arange(0, GROUPS)
        place = scales + expert[:, None, None] * SCALES + row[None, :, None] * (INTER // GROUP) + group[None, None, :]
        inside = chosen[:, None, None] & (row[None, :, None] < N) & (group[None, None, :] < INTER // GROUP)
        scale = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        each = tl.sum(product(sums - ABOVE * totals[:, None, :], scale), 2)
    else:
        if FORM == BLOCK_SCALES:
            block = start // BLOCK * ((INTER + BLOCK - 1) // BLOCK) + at // BLOCK
            act *= tl.load(scales + expert[:, None] * SCALES + block[None, :], mask=own, other=0.0)
        if HALVES:
            scale, inverse = scale_below_two(tl.max(tl.abs(act)))
            each = sum_in_halves(tile, (act * scale).to(tl.float16)[:, None, :]) * inverse
        else:
            each = tl.sum(product(tile.to(tl.float32), act[:, None, :]), 2)
        if FORM == ROW_SCALES:
            rows = chosen[:, None] & (row[None, :] < N)
            each *= tl.load(scales + expert[:, None] * SCALES + row[None, :], mask=rows, other=0.0).to(tl.float32)
        if FORM == ONE_SCALE:
            each *= tl.load(scales + expert * SCALES, mask=chosen, other=0.0)[:, None]
    return tl.sum(each, 0)


@triton.jit
def experts_down_kernel(
    acts, down_weight, down_scales, ids, weights, shared_acts, shared_weight, shared_scales, out,
    FORM: tl.constexpr, GROUP: tl.constexpr, SHARED_FORM: tl.constexpr, SHARED_GROUP: tl.constexpr,
    SCALES: tl.constexpr, N: tl.constexpr, INTER: tl.constexpr, INTER_P: tl.constexpr, S: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TOP_K: tl.constexpr, TOP_KP: tl.constexpr, HALVES: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    start = tl.program_id(1) * BN
    row = start + tl.arange(0, BN)
    launch_next()
    if S > 0:
        s_head, s_tail = load_weight(shared_weight, row, N, S, HEAD, TAIL, SHARED_FORM)
    wait_for_last()
    i = tl.arange(0, TOP_KP)
    chosen, slot = i < TOP_K, token * TOP_K + i
    expert = tl.load(ids + slot, mask=chosen, other=0).to(tl.int64)
    weight = tl.load(weights + slot, mask=chosen, other=0.0)
    y = _chosen_rows(
        *(acts, down_weight, down_scales, slot, expert, chosen, weight, start, row),
        *(FORM, GROUP, SCALES, N, INTER, INTER_P, HALVES),
    )
    if S > 0:
        head, tail = load_vector(shared_acts + token * S, S, HEAD, TAIL)
        y += multiply(
            *(s_head, s_tail, head, tail, shared_scales, start, row, N), S, HEAD, TAIL, SHARED_FORM, SHARED_GROUP
        )
    tl.store(out + token * N + row, y.to(out.dtype.element_ty), mask=row < N)


def experts(
    x: Tensor, up_weight: Weight, down_weight: Weight, ids: Tensor, weights: Tensor, shared_acts: Tensor,
    shared_weight: Weight | None,
) -> Tensor:  # fmt: skip
    return experts_down(experts_up(x, up_weight, ids), down_weight, ids, weights, shared_acts, shared_weight)


def experts_up(x: Tensor, up_weight: Weight, ids: Tensor, **tile: int) -> Tensor:
    (tokens, K), (_, twice, _), top_k = x.shape, up_weight.shape, ids.shape[1]
    values, scales, *form = stored(up_weight, x)
    width, slots = twice // 2, tokens * top_k
    tile = {"BN": 8, "num_warps": 2 if tokens > 1 and form[0] in EIGHT_BITS else 4, "HALVES": False} | tile
    out = x.new_empty(slots, width)
    experts_up_kernel[(slots, triton.cdiv(width, tile["BN"]))](
        *(x, values, scales, ids, out),
        *(*form, scales[0].numel(), K, *split(K), width, top_k),
        **tile,
        **LAUNCH,
    )
    return out


def experts_down(
    acts: Tensor, down_weight: Weight, ids: Tensor, weights: Tensor, shared_acts: Tensor, shared_weight: Weight | None,
    **tile: int,
) -> Tensor:  # fmt: skip
    (tokens, top_k), (_, N, width) = ids.shape, down_weight.shape
    values, scales, *form = stored(down_weight, acts)
    shared_values, shared_scales, *shared_form = stored(shared_weight, acts)
    shared = 0 if shared_weight is None else shared_weight.shape[1]
    tile = (
        {"HALVES": False} | _DOWN[form[0]] | ({"num_warps": 2} if form[0] == PLAIN.value and tokens < 4 else {}) | tile
    )
    out = acts.new_empty(tokens, N)
    experts_down_kernel[(tokens, triton.cdiv(N, tile["BN"]))](
        *(acts, values, scales, ids, weights, shared_acts, shared_values, shared_scales, out),
        *(*form, *shared_form, scales[0].numel(), N, width, triton.next_power_of_2(width), shared),
        *(*split(max(shared, 1)), top_k, triton.next_power_of_2(top_k)),
        **tile,
        **LAUNCH,
    )
    return out
