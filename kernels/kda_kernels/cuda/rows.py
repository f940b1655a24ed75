"""Which rows of a sequence a part of a call has, and which of them end where a state is to be exported."""

import triton
import triton.language as tl

CUT = tl.constexpr(1 << 32)
LAST = tl.constexpr((1 << 63) - 1)


@triton.jit
def cut(line, start, stop, C: tl.constexpr):
    """Where `line` cuts the sequence of rows start to stop: whole chunks of C rows, from its start, lie before."""
    return tl.where(line >= stop, stop, start + tl.maximum(line - start, 0) // C * C)


@triton.jit
def rows_of(cu_seqlens, sequence, begin, end, C: tl.constexpr):
    """start, first, last, stop: the sequence has rows start to stop, the part from begin to end first to last."""
    start, stop = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    return start, cut(begin, start, stop, C), cut(end, start, stop, C), stop


@triton.jit
def next_export(after, slots, exports, key):
    """The least of CUT * after[e] + slots[e] above `key`, over all exports e with a slot; LAST if there is none."""
    best = tl.full([256], LAST, tl.int64)
    for block in range(0, exports, 256):
        e = block + tl.arange(0, 256)
        slot = tl.load(slots + e, mask=e < exports, other=0).to(tl.int64)
        this = tl.load(after + e, mask=e < exports, other=0).to(tl.int64) * CUT + slot
        best = tl.where((slot > 0) & (this > key) & (this < best), this, best)
    return tl.min(best, 0)
