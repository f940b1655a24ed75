"""Which tokens of each sequence a part of a call has, its chunks, and the checkpoints that lie in it."""

import triton
import triton.language as tl

CUT = tl.constexpr(1 << 32)
LAST = tl.constexpr((1 << 63) - 1)


@triton.jit
def cut(token, start, stop, BT: tl.constexpr):
    """Where `token` cuts the sequence of tokens start to stop: whole chunks, from its start, lie before."""
    return tl.where(token >= stop, stop, start + tl.maximum(token - start, 0) // BT * BT)


@triton.jit
def token_range(cu_seqlens, sequence, begin, end, BT: tl.constexpr):
    """start, first, last, stop: the sequence has tokens start to stop, the part from begin to end first to last."""
    start, stop = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    return start, cut(begin, start, stop, BT), cut(end, start, stop, BT), stop


@triton.jit
def next_checkpoint(checkpoint_offsets, state_indices, num_checkpoints, key):
    """The least CUT * offset + state index above `key`, over all checkpoints that are to be stored, or LAST."""
    best = tl.full([256], LAST, tl.int64)
    for block in range(0, num_checkpoints, 256):
        e = block + tl.arange(0, 256)
        state_index = tl.load(state_indices + e, mask=e < num_checkpoints, other=0).to(tl.int64)
        this = tl.load(checkpoint_offsets + e, mask=e < num_checkpoints, other=0).to(tl.int64) * CUT + state_index
        best = tl.where((state_index > 0) & (this > key) & (this < best), this, best)
    return tl.min(best, 0)


@triton.jit(do_not_specialize=["begin", "end", "sequences", "chunks", "length", "least"])
def kda_chunk_index_kernel(
    cu_seqlens, chunk_offsets, chunk_seq_idx, begin, end, sequences, chunks, length, least, BT: tl.constexpr
):
    """chunk_offsets[n], chunk_seq_idx[chunk_offsets[n] ..] for the tokens from begin to end; -1 beyond the last.

    A chunk here has `length` times BT tokens; a sequence without tokens there has `least` chunks.
    """
    n = tl.program_id(0)
    before = 0
    here = 0
    for block in range(0, n + 1, 256):
        m = block + tl.arange(0, 256)
        start = tl.load(cu_seqlens + m, mask=m <= n, other=0)
        stop = tl.load(cu_seqlens + m + 1, mask=m <= n, other=0)
        tokens = cut(end, start, stop, BT) - cut(begin, start, stop, BT)
        count = tl.where(m <= n, tl.maximum((tokens + BT * length - 1) // (BT * length), least), 0)
        before += tl.sum(tl.where(m < n, count, 0), 0)
        here += tl.sum(tl.where(m == n, count, 0), 0)
    tl.store(chunk_offsets + n, before)
    for block in range(0, here, 256):
        m = block + tl.arange(0, 256)
        tl.store(chunk_seq_idx + before + m, tl.zeros([256], tl.int32) + n, mask=m < here)
    if n == sequences - 1:
        tl.store(chunk_offsets + sequences, before + here)
        for block in range(before + here, chunks, 256):
            m = block + tl.arange(0, 256)
            tl.store(chunk_seq_idx + m, tl.full([256], -1, tl.int32), mask=m < chunks)
