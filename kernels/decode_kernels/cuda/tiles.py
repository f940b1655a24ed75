"""Experts of 4-bit integers in the order of tensor cores' tiles, which vLLM's kernel for many tokens reads (`Tiles`).

A slice is 16 columns of 64 rows: 128 words in a row of memory. Lane 4 i + j of a warp has four of them, word q with
rows 16 q + i and 16 q + 8 + i, and of each the columns 2 j, 2 j + 1, 2 j + 8 and 2 j + 9, as `mma.m16n8k16` takes them.
A program has Q of the four words, and each of its warps slices of its own.
"""

import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import dot_rows, load_rows, load_vector, split
from decode_kernels.cuda.weights import ABOVE, nibble
from decode_kernels.weights import Tiles
from kda_kernels.cuda.elementwise import INTERPRETED, silu

# A 4-bit integer in the lowest bits of a bfloat16 whose other bits say 128 makes it 128 more; two of a word at a time.
_MULTIPLY = tl.constexpr("""{
.reg .b32 a0, a1, a2, a3, t; .reg .f32 d1, d3, z; mov.f32 z, 0f00000000;
lop3.b32 a0, $2, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $2, 4; lop3.b32 a2, t, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $2, 8; lop3.b32 a1, t, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $2, 12; lop3.b32 a3, t, 0x000F000F, 0x43004300, 0xEA;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, d1, $1, d3}, {a0, a1, a2, a3}, {$3, $4}, {z, z, z, z};
}""")
# -ABOVE times the sum of the vector.
_ABOVE = tl.constexpr("""{
.reg .b32 a; .reg .f32 d1, d2, d3, z;
mov.b32 a, 0xC308C308; mov.f32 z, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, d1, d2, d3}, {a, a, a, a}, {$1, $2}, {z, z, z, z};
}""")


@triton.jit
def _load_words(words, block, first_q, N: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
                Q: tl.constexpr):  # fmt: skip
    """[C, 32, Q] of slices from FIRST on: each lane its Q words."""
    c, at = FIRST + tl.arange(0, C)[:, None], tl.arange(0, 32 * Q)[None, :]
    place = words + c * (2 * N) + block * 128 + at // Q * 4 + first_q + at % Q
    return tl.reshape(tl.load(place, mask=c < K // 16, other=0), [C, 32, Q])


@triton.jit
def _load_scales(scales, block, first_q, N: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
                 GROUP: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Of the first and the second row of each word: two of [C, 32, Q]."""
    c, at = FIRST + tl.arange(0, C)[:, None], tl.arange(0, 64 * Q)[None, :]
    place = scales + c * 16 // GROUP * N + block * 64 + at // (8 * Q) * 8 + first_q * 2 + at % (2 * Q)
    both = tl.load(place, mask=c < K // 16, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(both, [C, 32, Q, 2]))


@triton.jit
def _load_pairs(x, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Each lane's columns 2 j and 2 j + 1 of every slice, two of [C, 32, 1]: for tensor cores those of the first four
    lanes, which have the first of the other factor's eight columns."""
    c, at = FIRST + tl.arange(0, C)[:, None], tl.arange(0, 64)[None, :]
    # Two of a lane's at a time, though more lie in a row: where they are is where a lane's words are.
    place = tl.max_contiguous(x + c * 16 + at % 8, [1, 2])
    pairs = tl.load(place, mask=(c < K // 16) & (INTERPRETED | (at < 8)), other=0.0)
    first, second = tl.split(tl.reshape(pairs, [C, 32, 2]))
    return first[:, :, None], second[:, :, None]


@triton.jit
def _both(first, second):
    """Two bfloat16 in a word."""
    low, high = first.to(tl.uint16, bitcast=True).to(tl.uint32), second.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (high << 16 | low).to(tl.int32, bitcast=True)


@triton.jit
def _half(words, x0, x1, x8, x9, HALF: tl.constexpr):
    """As a tensor core, for the first or the second row of each word; of its sum over a row each lane has a part."""
    out = nibble(words, 2 * HALF) * x0 + nibble(words, 2 * HALF + 4) * x1 - ABOVE * (x0 + x1 + x8 + x9)
    return out + nibble(words, 2 * HALF + 1) * x8 + nibble(words, 2 * HALF + 5) * x9


@triton.jit
def _rows(words, x, FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """The first and the second rows of words [C, 32, Q] times their slices of x; four lanes have parts of a row."""
    x0, x1 = _load_pairs(x, FIRST, C, K)
    x8, x9 = _load_pairs(x + 8, FIRST, C, K)
    if INTERPRETED:
        low, high = _half(words, x0, x1, x8, x9, 0), _half(words, x0, x1, x8, x9, 1)
    else:
        b0, b1 = _both(x0, x1), _both(x8, x9)
        above = tl.inline_asm_elementwise(_ABOVE, "=f,r,r", [b0, b1], dtype=tl.float32, is_pure=True, pack=1)
        low, high = tl.inline_asm_elementwise(
            *(_MULTIPLY, "=f,=f,r,r,r", [words, b0, b1]), dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
        low, high = low + above, high + above
    return low, high


@triton.jit
def _add_slices(
    low, high, words, scales, x, weight, block, first_q, N: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """low and high [C, 32, Q], and weight times what C slices from FIRST on add to them."""
    C: tl.constexpr = low.shape[0]
    Q: tl.constexpr = low.shape[2]
    word = _load_words(words, block, first_q, N, FIRST, C, K, Q)
    low_scale, high_scale = _load_scales(scales, block, first_q, N, FIRST, C, K, GROUP, Q)
    more, above = _rows(word, x, FIRST, C, K)
    return low + more * (low_scale * weight), high + above * (high_scale * weight)


@triton.jit
def _sum_rows(low, high):
    """[C, 32, Q] each -> [8, Q] each."""
    Q: tl.constexpr = low.shape[2]
    both = tl.sum(tl.join(low, high), 0)
    return tl.split(tl.sum(tl.reshape(both, [8, 4, Q, 2]), 1))


@triton.jit
def _first_rows(block, first_q, Q: tl.constexpr):
    """[8, Q]; the second row of a word is 8 below."""
    return block * 64 + (first_q + tl.arange(0, Q))[None, :] * 16 + tl.arange(0, 8)[:, None]


@triton.jit
def tiled_up_kernel(
    x, up_weight, up_scales, ids, out, K: tl.constexpr, N: tl.constexpr, INTER: tl.constexpr, GROUP: tl.constexpr,
    TOP_K: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    slot, block, first_q = tl.program_id(0), tl.program_id(1) // (4 // Q), tl.program_id(1) % (4 // Q) * Q
    launch_next()
    wait_for_last()
    expert = tl.load(ids + slot).to(tl.int64)
    words, scales = up_weight + expert * (K // 8 * N), up_scales + expert * (K // GROUP * N)
    own = x + slot // TOP_K * K
    gate, gate_below = tl.zeros([C, 32, Q], tl.float32), tl.zeros([C, 32, Q], tl.float32)
    up, up_below = gate, gate
    above = block + INTER // 64
    for first in tl.static_range(0, K // 16, C):
        gate, gate_below = _add_slices(gate, gate_below, words, scales, own, 1.0, block, first_q, N, first, K, GROUP)
        up, up_below = _add_slices(up, up_below, words, scales, own, 1.0, above, first_q, N, first, K, GROUP)
    gate, gate_below = _sum_rows(gate, gate_below)
    up, up_below = _sum_rows(up, up_below)
    row = slot * INTER + _first_rows(block, first_q, Q)
    low, high = silu(gate) * up, silu(gate_below) * up_below
    tl.store(out + row, low.to(out.dtype.element_ty))
    tl.store(out + row + 8, high.to(out.dtype.element_ty))


@triton.jit
def tiled_down_kernel(
    acts, down_weight, down_scales, ids, weights, shared_acts, shared_weight, out,
    N: tl.constexpr, HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TOP_K: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    token, block, first_q = tl.program_id(0), tl.program_id(1) // (4 // Q), tl.program_id(1) % (4 // Q) * Q
    row = _first_rows(block, first_q, Q)
    launch_next()
    if S > 0:
        flat = tl.reshape(row, [8 * Q])
        low_head, low_tail = load_rows(shared_weight, flat, HIDDEN, S, HEAD, TAIL)
        high_head, high_tail = load_rows(shared_weight, flat + 8, HIDDEN, S, HEAD, TAIL)
    wait_for_last()
    low, high = tl.zeros([C, 32, Q], tl.float32), tl.zeros([C, 32, Q], tl.float32)
    for i in tl.static_range(TOP_K):
        slot = token * TOP_K + i
        expert, weight = tl.load(ids + slot).to(tl.int64), tl.load(weights + slot)
        words, scales = down_weight + expert * (INTER // 8 * N), down_scales + expert * (INTER // GROUP * N)
        own = acts + slot * INTER
        for first in tl.static_range(0, INTER // 16, C):
            low, high = _add_slices(low, high, words, scales, own, weight, block, first_q, N, first, INTER, GROUP)
    y, below = _sum_rows(low, high)
    if S > 0:
        head, tail = load_vector(shared_acts + token * S, S, HEAD, TAIL)
        y += tl.reshape(dot_rows(low_head, low_tail, head, tail), [8, Q])
        below += tl.reshape(dot_rows(high_head, high_tail, head, tail), [8, Q])
    tl.store(out + token * HIDDEN + row, y.to(out.dtype.element_ty))
    tl.store(out + token * HIDDEN + row + 8, below.to(out.dtype.element_ty))


def tiled_up(x: Tensor, up_weight: Tiles, ids: Tensor, inter: int, **tile: int) -> Tensor:
    """inter: channels of an expert; further rows than twice as many are not read."""
    (tokens, K), (_, N, _), top_k = x.shape, up_weight.shape, ids.shape[1]
    tile = {"Q": 4, "num_warps": 8} | tile
    out = x.new_empty(tokens * top_k, inter)
    tiled_up_kernel[(tokens * top_k, inter // 64 * (4 // tile["Q"]))](
        *(x, up_weight.values, up_weight.scales, ids, out, K, N, inter, up_weight.group, top_k),
        C=tile["num_warps"],
        **tile,
        **LAUNCH,
    )
    return out


def tiled_down(
    acts: Tensor, down_weight: Tiles, ids: Tensor, weights: Tensor, shared_acts: Tensor, shared_weight: Tensor | None,
    hidden: int, **tile: int,
) -> Tensor:  # fmt: skip
    """hidden: the output's width; further rows are not read."""
    (tokens, top_k), (_, N, width) = ids.shape, down_weight.shape
    shared = 0 if shared_weight is None else shared_weight.shape[1]
    tile = {"Q": 2, "num_warps": 8} | tile
    out = acts.new_empty(tokens, hidden)
    tiled_down_kernel[(tokens, hidden // 64 * (4 // tile["Q"]))](
        *(acts, down_weight.values, down_weight.scales, ids, weights, shared_acts, shared_weight, out),
        *(N, hidden, width, down_weight.group, shared, *split(max(shared, 1)), top_k),
        C=tile["num_warps"],
        **tile,
        **LAUNCH,
    )
    return out
