"""A matrix as a kernel takes it: plain, or as a quantised checkpoint stores it, widened in registers.

FORM says which. ROW_SCALES: fp8 or int8, each row with a scale; ONE_SCALE: one for all. BLOCK_SCALES: fp8, each
128 x 128 with one, which multiplies the vector instead, for the rows of a program lie in one block. PACKED: eight 4-bit
integers in a word, each GROUP columns of a row with a scale.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.vectors import dot_rows, load_rows, product, scale_below_two, sum_in_halves
from decode_kernels.weights import INT4_ZERO, QuantizedWeight, Weight
from kda_kernels.cuda.elementwise import INTERPRETED

PLAIN, ROW_SCALES, BLOCK_SCALES, PACKED, ONE_SCALE = (tl.constexpr(i) for i in range(5))
BLOCK = tl.constexpr(128)
# A 4-bit integer v in bits 16 to 19 of a float whose other bits say 128 makes it 128 + v.
ABOVE = tl.constexpr(128.0 + INT4_ZERO)


class Stored(NamedTuple):
    """Arguments of a launch: two pointers, two constants."""

    values: Tensor
    scales: Tensor
    form: int
    group: int


def stored(weight: Weight | None, instead: Tensor) -> Stored:
    """Of [..., N, K]; `instead` stands for a tensor that is not there."""
    if not isinstance(weight, QuantizedWeight):
        return Stored(instead if weight is None else weight, instead, PLAIN.value, 0)
    if weight.rows == 1:
        form = PACKED if weight.values.dtype == torch.int32 else ROW_SCALES
    else:
        form = ONE_SCALE if weight.scales.shape[-2:] == (1, 1) else BLOCK_SCALES
    return Stored(weight.values, weight.scales, form.value, min(weight.group, weight.shape[-1]))


@triton.jit
def load_weight(matrix, row, rows, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, FORM: tl.constexpr):
    """As `load_rows`, of what is stored: of a packed matrix an eighth as many words."""
    if FORM == PACKED:
        head, tail = load_rows(matrix, row, rows, K // 8, HEAD // 8, TAIL // 8)
    else:
        head, tail = load_rows(matrix, row, rows, K, HEAD, TAIL)
    return head, tail


@triton.jit
def row_scales(scales, row, rows):
    return tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def column_scales(scales, start, at, K: tl.constexpr):
    """Of columns `at`, for the block that row `start` lies in."""
    return tl.load(scales + start // BLOCK * ((K + BLOCK - 1) // BLOCK) + at // BLOCK, mask=at < K, other=0.0)


@triton.jit
def _nibble(words, PLACE: tl.constexpr):
    """ABOVE more than the integer at this place of each word, in fp32."""
    bits = words << (16 - 4 * PLACE) if PLACE < 4 else words >> (4 * PLACE - 16)
    if INTERPRETED:
        bits = (bits & 0xF0000) | 0x43000000
    else:  # the compiler makes two of it
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0000, 0x43000000, 0xEA;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unpack(words):
    """[..., W] -> [..., 8 W] in fp32, ABOVE more than each integer; a thread keeps what it has."""
    even = tl.interleave(
        tl.interleave(_nibble(words, 0), _nibble(words, 4)), tl.interleave(_nibble(words, 2), _nibble(words, 6))
    )
    odd = tl.interleave(
        tl.interleave(_nibble(words, 1), _nibble(words, 5)), tl.interleave(_nibble(words, 3), _nibble(words, 7))
    )
    return tl.interleave(even, odd)


@triton.jit
def _dot_packed(words, x, scales, row, rows, at, K: tl.constexpr, GROUP: tl.constexpr):
    """Rows of words [BN, W], from column `at` on, with a vector [8 W]: [BN]."""
    BN: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = x.shape[0] // GROUP
    sums = tl.sum(tl.reshape(product(unpack(words), x[None, :]), [BN, GROUPS, GROUP]), 2)
    totals = tl.sum(tl.reshape(x, [GROUPS, GROUP]), 1)
    group = at // GROUP + tl.arange(0, GROUPS)
    inside = (row[:, None] < rows) & (group[None, :] < K // GROUP)
    scale = tl.load(scales + row[:, None] * (K // GROUP) + group[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(product(sums - ABOVE * totals[None, :], scale), 1)


@triton.jit
def multiply(
    w_head, w_tail, head, tail, scales, start, row, rows,
    K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr = False,
):  # fmt: skip
    """What `load_weight` gives for rows `row` [BN] from `start` on, times a vector [K]: [BN], summed in fp32.

    HALVES, for eight bits: products in fp16 (`sum_in_halves`).
    """
    if FORM == PACKED:
        out = _dot_packed(w_head, head, scales, row, rows, 0, K, GROUP)
        if K > HEAD:
            out += _dot_packed(w_tail, tail, scales, row, rows, HEAD, K, GROUP)
    else:
        if FORM == BLOCK_SCALES:
            head *= column_scales(scales, start, tl.arange(0, HEAD), K)
            tail *= column_scales(scales, start, HEAD + tl.arange(0, TAIL), K)
        if HALVES:
            scale, inverse = scale_below_two(tl.maximum(tl.max(tl.abs(head)), tl.max(tl.abs(tail))))
            out = sum_in_halves(w_head, (head * scale).to(tl.float16)[None, :])
            out = (out + sum_in_halves(w_tail, (tail * scale).to(tl.float16)[None, :])) * inverse
        else:
            out = dot_rows(w_head, w_tail, head, tail)
        if FORM == ROW_SCALES:
            out *= row_scales(scales, row, rows)
        if FORM == ONE_SCALE:
            out *= tl.load(scales)
    return out
