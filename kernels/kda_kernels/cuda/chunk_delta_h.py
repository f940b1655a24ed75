"""Prefill, third pass: the state from chunk to chunk (docs/kda.md section 6).

One program serves BV value columns of one (sequence, head), or of one segment of `length` chunks, in fp32:
  v_new = u - w S    S_next = diag(exp(G_last)) S + kg^T v_new
and leaves v_new (over u) and h, the S that each chunk starts from, to the last pass. Operands are fp16, so v_new and h
are kept relative to a power of two, `h_scale`, chosen from the largest of the initial state and all chunks' v, with a
factor of 4096 to spare.

One long sequence of few heads has too few such programs for a GPU. Its segments are then first summed up, all at
once: a segment maps its first state S to A S + B, and the same loop gives B (from S = 0) and A (from the identity,
without u). `kda_combine_segments_kernel` runs along them, and the pass itself starts every segment from its true state.

| argument        | dtype, shape              | meaning                                                               |
| --------------- | ------------------------- | --------------------------------------------------------------------- |
| u               | operand [chunks, H, BT, V] | in: u / u_scale; out: v_new * h_scale                                |
| h               | operand [chunks, H, K, V] | out: h_scale * S before each chunk                                    |
| h_scale         | fp32 [segments, H, V/BV]  | out                                                                   |
| initial_states  | fp32 [segments, H, K, V]  | state before each segment                                             |
| transitions     | fp32 [segments, H, K, V]  | A of each segment                                                     |
| recurrent_state | [S, H, V, K]              | in, if the sequence has an initial state; out                         |
| conv_state      | [S, W-1, 3P]              | out: the sequence's last W-1 inputs of the convolution                |
| checkpoint_*    | int32 [num_checkpoints]   | out: the state after so many tokens, at these state indices as well   |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import power_of_two
from kda_kernels.cuda.index import CUT, next_checkpoint, token_range


@triton.jit
def store_conv_state(
    part, head, qkv, conv_state, start, stop, use_initial_state, source, target,
    qkv_stride, conv_state_stride, conv_token_stride, P,
    D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Store the inputs of tokens stop-W+1 .. stop of one part and head as the conv state `target`.

    What came before token `start` is taken from the conv state `source`, if the sequence has an initial state.
    """
    tap = tl.arange(0, BW)[:, None]
    column = part * P + head * D + tl.arange(0, D)[None, :]
    back = stop - start - (W - 1) + tap  # the token's distance from the sequence's start
    used = tap < W - 1
    x = tl.load(qkv + (start + back).to(tl.int64) * qkv_stride + column, mask=used & (back >= 0), other=0.0)
    place = conv_state + source * conv_state_stride + (back + W - 1) * conv_token_stride + column
    oldest = tl.where(use_initial_state, 1 - W, 0)
    past = tl.load(place, mask=used & (back < 0) & (back >= oldest), other=0.0)
    x = tl.where(back >= 0, x, past)
    tl.debug_barrier()  # all threads have read before one stores: inputs shift within the state
    tl.store(conv_state + target * conv_state_stride + tap * conv_token_stride + column, x, mask=used)


@triton.jit
def update_state(
    S, first, after, head, part, unit, w, u, kg, decay, u_scale, h, heads, chunks,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """unit * S after the chunks first .. after - 1, from unit * S before them."""
    operand = w.dtype.element_ty
    key, row = tl.arange(0, D)[:, None], tl.arange(0, BT)[:, None]
    identity = part >= D // BV
    value = part % (D // BV) * BV + tl.arange(0, BV)[None, :]
    tile = first.to(tl.int64) * heads + head
    channel = tl.arange(0, D)
    fade = tl.load(decay + tile * D + channel, mask=channel < tl.where(first < after, D, 0), other=0.0)
    for chunk in range(first, after):
        # One chunk ahead, by hand: Triton does so only for what goes into a product.
        some = tl.where(chunk + 1 < after, D, 0)
        ahead = tl.load(decay + (tile + heads) * D + channel, mask=channel < some, other=0.0)
        narrow = S.to(operand)
        b_w = tl.load(w + (tile * BT + row) * D + tl.arange(0, D)[None, :])
        place = u + (tile * BT + row) * D + value
        if SUMMARY:
            v_new = tl.load(place, mask=row < tl.where(identity, 0, BT), other=0.0).to(tl.float32)
        else:
            tl.store(h + tile * D * D + key * D + value, narrow)
            v_new = tl.load(place).to(tl.float32)
        v_new *= tl.load(u_scale + head * chunks + chunk) * unit
        v_new -= tl.dot(b_w, narrow, input_precision="ieee")
        v_narrow = v_new.to(operand)
        if not SUMMARY:
            tl.store(place, v_narrow)
        b_kg = tl.load(kg + (tile * BT + tl.arange(0, BT)[None, :]) * D + key)
        S = tl.dot(b_kg, v_narrow, S * fade[:, None], input_precision="ieee")
        fade = ahead
        tile += heads
    return S


@triton.jit(
    do_not_specialize=["begin", "end", "length", "chunks", "num_checkpoints"],
    do_not_specialize_on_alignment=["state_indices", "checkpoint_offsets", "checkpoint_state_indices"],
)
def kda_chunk_delta_h_kernel(
    qkv, conv_state, recurrent_state, state_indices, has_initial_state, cu_seqlens, chunk_offsets,
    segment_seq_idx, segment_offsets, w, u, kg, decay, u_scale, h, h_scale, initial_states, transitions,
    checkpoint_offsets, checkpoint_state_indices, num_checkpoints, begin, end, length,
    qkv_stride, conv_state_stride, conv_token_stride, recurrent_state_stride, heads, chunks,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    SEGMENTS: tl.constexpr, SUMMARY: tl.constexpr, STORE_CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    part, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SEGMENTS:
        sequence = tl.load(segment_seq_idx + segment)
        if sequence < 0:
            return
        is_first = segment == tl.load(segment_offsets + sequence)
        is_last = segment + 1 == tl.load(segment_offsets + sequence + 1)
        is_only = is_first & is_last
    else:
        sequence, is_first, is_last, is_only = segment, True, True, True
    state_index = tl.load(state_indices + sequence).to(tl.int64)
    if state_index <= 0:
        return
    start, done, last, stop = token_range(cu_seqlens, sequence, begin, end, BT)
    continued = done > start
    first, after = tl.load(chunk_offsets + sequence), tl.load(chunk_offsets + sequence + 1)
    use_initial_state = tl.load(has_initial_state + sequence) != 0
    if SEGMENTS:
        skipped = (segment - tl.load(segment_offsets + sequence)) * length
        first += skipped
        done += skipped * BT
        after = tl.minimum(after, first + length)
    # Nothing of it here; an empty one without an initial state resets its state, in the first part of a call.
    if (first == after) & ((start < stop) | (begin > 0)):
        return
    if SUMMARY:
        if is_last:
            return  # nobody goes on from it
        if is_first & (part >= D // BV):
            return  # its start is known: no transition needed
    key = tl.arange(0, D)[:, None]
    identity = part >= D // BV
    value = part % (D // BV) * BV + tl.arange(0, BV)[None, :]
    recurrent_state += head * D * D + value * D + key
    state = recurrent_state + state_index * recurrent_state_stride
    matrix = (segment.to(tl.int64) * heads + head) * D * D + key * D + value
    S = tl.zeros([D, BV], tl.float32)
    if identity:
        S = tl.where(key == value, 1.0, 0.0)
    elif is_only | (is_first & SUMMARY):
        if use_initial_state | continued:
            S = tl.load(state).to(tl.float32)
        if SUMMARY:
            tl.store(initial_states + matrix, S)  # the last segment will overwrite the state
    elif not SUMMARY:
        S = tl.load(initial_states + matrix)
    largest = tl.max(tl.max(tl.abs(S), 1), 0)
    for chunk in range(first, after, 1024):
        index = chunk + tl.arange(0, 1024)
        scales = tl.load(u_scale + head * chunks + index, mask=index < after, other=0.0)
        largest = tl.maximum(largest, tl.max(scales, 0))
    unit = 16.0 / power_of_two(largest)
    if not SUMMARY:
        tl.store(h_scale + (segment * heads + head) * (D // BV) + part, unit)
    S *= unit

    if STORE_CHECKPOINTS:  # in the order of their tokens; between two of them the loop over chunks runs on undisturbed
        final = tl.minimum(done + (after - first) * BT, last)
        reached = done.to(tl.int64) * CUT + (CUT - 1)
        checkpoint = next_checkpoint(checkpoint_offsets, checkpoint_state_indices, num_checkpoints, reached)
        while checkpoint // CUT <= final:
            token = (checkpoint // CUT).to(tl.int32)
            here = first + (token - done + BT - 1) // BT
            S = update_state(
                S, first, here, head, part, unit, w, u, kg, decay, u_scale, h, heads, chunks, D, BT, BV, SUMMARY
            )
            done += (here - first) * BT
            first = here
            target = checkpoint % CUT
            tl.store(recurrent_state + target * recurrent_state_stride, (S / unit).to(recurrent_state.dtype.element_ty))
            if part == 0:
                for which in tl.static_range(3):
                    store_conv_state(
                        which, head, qkv, conv_state, start, token, use_initial_state, state_index, target,
                        qkv_stride, conv_state_stride, conv_token_stride, heads * D, D, W, BW,
                    )  # fmt: skip
            checkpoint = next_checkpoint(checkpoint_offsets, checkpoint_state_indices, num_checkpoints, checkpoint)
    S = update_state(S, first, after, head, part, unit, w, u, kg, decay, u_scale, h, heads, chunks, D, BT, BV, SUMMARY)
    S /= unit
    if SUMMARY:
        if identity:
            tl.store(transitions + matrix, S)
        else:
            tl.store(initial_states + matrix + heads * D * D, S)
    elif is_last:
        tl.store(state, S.to(recurrent_state.dtype.element_ty))
        if (part == 0) & (last == stop):
            for which in tl.static_range(3):
                store_conv_state(
                    which, head, qkv, conv_state, start, stop, use_initial_state, state_index, state_index,
                    qkv_stride, conv_state_stride, conv_token_stride, heads * D, D, W, BW,
                )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["state_indices"])
def kda_combine_segments_kernel(
    state_indices, segment_offsets, initial_states, transitions, heads, D: tl.constexpr, BV: tl.constexpr
):
    """initial_states[s+1] += transitions[s] initial_states[s], for each segment s but a sequence's first and last."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, after = tl.load(segment_offsets + sequence), tl.load(segment_offsets + sequence + 1)
    if (tl.load(state_indices + sequence) <= 0) | (after - first < 3):
        return
    key, inner = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    value = part * BV + tl.arange(0, BV)[None, :]
    matrix = ((first + 1).to(tl.int64) * heads + head) * D * D
    S = tl.load(initial_states + matrix + key * D + value)
    for _ in range(first + 1, after - 1):
        transition = tl.load(transitions + matrix + key * D + inner)
        matrix += heads * D * D
        place = initial_states + matrix + key * D + value
        S = tl.dot(transition, S, tl.load(place), input_precision="tf32x3")  # fp32 on the tensor cores
        tl.store(place, S)
