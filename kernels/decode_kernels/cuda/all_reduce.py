"""The sum over ranks, the residual's addition and the RMS norm of a few tokens in one launch, over NVLink.

Each rank writes its part into the memory of every other one. A word of 8 bytes holds 4 of the part and the number of
the call, so that who reads it sees by itself whether it has come: no barrier, no fence. The parts are added in the
order of the ranks, on all of them: the same bits everywhere, and in every run.

There are two places for a token, taken in turns. A rank writes to one again when it has read the call in between, which
the others began after they had read what was there before.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import product

PLACES = 2


@dataclass(frozen=True)
class Workspace:
    """What `all_reduce_add_norm` of one rank works on.

    buffers: [ranks] int64, addresses of `buffer_bytes` zeroed bytes of each rank's memory, as this one reaches them.
    calls: [tokens] int32 zeros, as many as a call may have. All ranks make the same calls.
    """

    buffers: Tensor
    calls: Tensor
    rank: int

    @staticmethod
    def buffer_bytes(ranks: int, tokens: int, row_bytes: int) -> int:
        """For rows of x of so many bytes."""
        return PLACES * ranks * tokens * 2 * row_bytes


@triton.jit
def _values(words, PAIRS: tl.constexpr):
    """The two bf16 of each word, or its fp32 and zero."""
    if PAIRS:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        return words.to(tl.float32, bitcast=True), tl.zeros_like(words).to(tl.float32)


@triton.jit
def _words(low, high, PAIRS: tl.constexpr):
    """The inverse of `_values`, rounded."""
    if PAIRS:
        first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        return first | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return low.to(tl.int32, bitcast=True)


@triton.jit
def _buffer(buffers, rank):
    return tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def all_reduce_add_norm_kernel(
    x, residual, norm_weight, y, new_residual, buffers, calls, x_stride, residual_stride, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, WORDS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """One token a program. All tensors are of words, two bf16 or one fp32 each."""
    token = tl.program_id(0)
    at = tl.arange(0, PADDED)
    inside = at < WORDS
    launch_next()
    n_low, n_high = _values(tl.load(norm_weight + at, mask=inside, other=0), PAIRS)
    wait_for_last()
    call = tl.load(calls + token) + 1
    own = tl.load(x + token * x_stride + at, mask=inside, other=0)
    place = ((call & 1) * RANKS * MOST + token) * WORDS + at
    sent = (call.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for other in tl.static_range(RANKS):
        if other != RANK:
            tl.store(_buffer(buffers, other) + RANK * MOST * WORDS + place, sent, mask=inside)
    more = tl.load(residual + token * residual_stride + at, mask=inside, other=0)
    buffer = _buffer(buffers, RANK)
    low, high = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    for other in tl.static_range(RANKS):
        part = own
        if other != RANK:
            source = buffer + other * MOST * WORDS + place
            got = tl.load(source, mask=inside, other=0, volatile=True)
            while tl.max((inside & ((got >> 32).to(tl.int32) != call)).to(tl.int32), 0) != 0:
                got = tl.load(source, mask=inside, other=0, volatile=True)
            part = got.to(tl.int32)
        part_low, part_high = _values(part, PAIRS)
        low += part_low
        high += part_high
    more_low, more_high = _values(more, PAIRS)
    total = _words(low + more_low, high + more_high, PAIRS)
    low, high = _values(total, PAIRS)
    VALUES: tl.constexpr = 2 * WORDS if PAIRS else WORDS
    scale = tl.rsqrt((tl.sum(product(low, low)) + tl.sum(product(high, high))) / VALUES + eps)
    tl.store(new_residual + token * WORDS + at, total, mask=inside)
    tl.store(y + token * WORDS + at, _words(low * scale * n_low, high * scale * n_high, PAIRS), mask=inside)
    tl.store(calls + token, call)


def all_reduce_add_norm(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """x [T, K] of each rank -> the norm of their sum + residual, and that: [T, K] each, of `x.dtype`.

    residual [T, K] and norm_weight [K] are alike on all ranks, and of x's dtype, bf16 or fp32. Returns when all ranks
    have called. Raises ValueError for more tokens than the workspace has room for.
    """
    tokens, K = x.shape
    if tokens > len(workspace.calls):
        raise ValueError(f"{tokens} tokens; the workspace has room for {len(workspace.calls)}")
    y, new_residual = (x.new_empty(tokens, K) for _ in range(2))
    wx, wr, wn, wy, wnew = (each.view(torch.int32) for each in (x, residual, norm_weight, y, new_residual))
    words = wx.shape[1]
    all_reduce_add_norm_kernel[(tokens,)](
        *(wx, wr, wn, wy, wnew, workspace.buffers, workspace.calls, wx.stride(0), wr.stride(0), eps),
        *(workspace.rank, len(workspace.buffers), len(workspace.calls), x.dtype == torch.bfloat16, words),
        triton.next_power_of_2(words),
        num_warps=8,
        **LAUNCH,
    )
    return y, new_residual
