"""Prefill, third pass: the states, chunk after chunk (docs/kda.md section 6).

One program serves BV value columns of one (sequence, head), or of one segment of `length` chunks, in fp32:
  N = U - W S    S_next = diag(exp(G_last)) S + (exp(G_last - G) k)^T N
and leaves N (over U) and the S that each chunk starts from to the last pass. Operands are fp16, so N and S are
kept relative to a power of two, `unit`, chosen from the largest of the initial state and all chunks' v, with a
factor of 4096 to spare.

One long sequence of few heads has too few such programs for a GPU. Its segments are then first summed up, all at
once: a segment maps its first state S to A S + B, and the same loop gives B (from S = 0) and A (from the identity,
without U). `combine_kernel` runs along them, and the pass itself starts every segment from its true state.

| argument  | dtype, shape              | meaning                                                          |
| --------- | ------------------------- | ---------------------------------------------------------------- |
| u         | operand [N, H, C, V]      | in: U / scale; out: N * unit                                     |
| snapshots | operand [N, H, K, V]      | out: unit * S before each chunk                                  |
| units     | fp32 [segments, H, V/BV]  | out: unit                                                        |
| starts, transitions | fp32 [segments, H, K, V] | state before each segment; A of each segment     |
| recurrent | [slots, H, V, K]          | in, if the sequence goes on; out                                 |
| conv      | [slots, taps-1, 3P]       | out: the sequence's last taps-1 inputs of the convolution        |
| export_after, export_slots | int32 [exports] | out: the state after so many rows, in these slots as well  |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import power_of_two
from kda_kernels.cuda.rows import CUT, next_export, rows_of


@triton.jit
def keep_inputs(
    part, head, qkv, conv, start, stop, go_on, source, slot, qkv_stride, conv_slot, conv_tap, P,
    D: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Store the inputs of rows stop-taps+1 .. stop of one part and head as the slot's conv state.

    What came before row `start` is taken from the conv state of slot `source`, if the sequence goes on.
    """
    tap = tl.arange(0, WINDOW)[:, None]
    column = part * P + head * D + tl.arange(0, D)[None, :]
    back = stop - start - (TAPS - 1) + tap  # the row's distance from the sequence's start
    used = tap < TAPS - 1
    x = tl.load(qkv + (start + back).to(tl.int64) * qkv_stride + column, mask=used & (back >= 0), other=0.0)
    place = conv + source * conv_slot + (back + TAPS - 1) * conv_tap + column
    oldest = tl.where(go_on, 1 - TAPS, 0)
    past = tl.load(place, mask=used & (back < 0) & (back >= oldest), other=0.0)
    x = tl.where(back >= 0, x, past)
    tl.debug_barrier()  # all threads have read before one stores: taps shift within the slot
    tl.store(conv + slot * conv_slot + tap * conv_tap + column, x, mask=used)


@triton.jit
def through_chunks(
    S, first, after, head, part, unit, w, u, kd, decay, scale, snapshots, heads, chunks,
    D: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """unit * S after the chunks first .. after - 1, from unit * S before them."""
    operand = w.dtype.element_ty
    key, row = tl.arange(0, D)[:, None], tl.arange(0, C)[:, None]
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
        weights = tl.load(w + (tile * C + row) * D + tl.arange(0, D)[None, :])
        place = u + (tile * C + row) * D + value
        if SUMMARY:
            N = tl.load(place, mask=row < tl.where(identity, 0, C), other=0.0).to(tl.float32)
        else:
            tl.store(snapshots + tile * D * D + key * D + value, narrow)
            N = tl.load(place).to(tl.float32)
        N *= tl.load(scale + head * chunks + chunk) * unit
        N -= tl.dot(weights, narrow, input_precision="ieee")
        N_narrow = N.to(operand)
        if not SUMMARY:
            tl.store(place, N_narrow)
        keys = tl.load(kd + (tile * C + tl.arange(0, C)[None, :]) * D + key)
        S = tl.dot(keys, N_narrow, S * fade[:, None], input_precision="ieee")
        fade = ahead
        tile += heads
    return S


@triton.jit(
    do_not_specialize=["begin", "end", "length", "chunks", "exports"],
    do_not_specialize_on_alignment=["slots", "export_after", "export_slots"],
)
def states_kernel(
    qkv, conv, recurrent, slots, resume, cu_seqlens, first_chunk, segment_sequence, first_segment,
    w, u, kd, decay, scale, snapshots, units, starts, transitions, export_after, export_slots,
    exports, begin, end, length, qkv_stride, conv_slot, conv_tap, recurrent_slot, heads, chunks,
    D: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr, SUMMARY: tl.constexpr, EXPORTS: tl.constexpr,
):  # fmt: skip
    part, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SEGMENTS:
        sequence = tl.load(segment_sequence + segment)
        if sequence < 0:
            return
        is_first = segment == tl.load(first_segment + sequence)
        is_last = segment + 1 == tl.load(first_segment + sequence + 1)
        is_only = is_first & is_last
    else:
        sequence, is_first, is_last, is_only = segment, True, True, True
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot <= 0:
        return
    start, done, last, stop = rows_of(cu_seqlens, sequence, begin, end, C)
    going = done > start
    first, after = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    resumed = tl.load(resume + sequence) != 0
    if SEGMENTS:
        skipped = (segment - tl.load(first_segment + sequence)) * length
        first += skipped
        done += skipped * C
        after = tl.minimum(after, first + length)
    # Nothing of it here; an empty sequence resets its slot if it does not go on, in the first part of a call.
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
    recurrent += head * D * D + value * D + key
    state = recurrent + slot * recurrent_slot
    matrix = (segment.to(tl.int64) * heads + head) * D * D + key * D + value
    S = tl.zeros([D, BV], tl.float32)
    if identity:
        S = tl.where(key == value, 1.0, 0.0)
    elif is_only | (is_first & SUMMARY):
        if resumed | going:
            S = tl.load(state).to(tl.float32)
        if SUMMARY:
            tl.store(starts + matrix, S)  # the last segment will overwrite the slot
    elif not SUMMARY:
        S = tl.load(starts + matrix)
    largest = tl.max(tl.max(tl.abs(S), 1), 0)
    for chunk in range(first, after, 1024):
        index = chunk + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.max(tl.load(scale + head * chunks + index, mask=index < after, other=0.0), 0))
    unit = 16.0 / power_of_two(largest)
    if not SUMMARY:
        tl.store(units + (segment * heads + head) * (D // BV) + part, unit)
    S *= unit

    if EXPORTS:  # in the order of their rows; between two of them the loop over chunks runs on undisturbed
        final = tl.minimum(done + (after - first) * C, last)
        export = next_export(export_after, export_slots, exports, done.to(tl.int64) * CUT + (CUT - 1))
        while export // CUT <= final:
            line = (export // CUT).to(tl.int32)
            here = first + (line - done + C - 1) // C
            S = through_chunks(
                S, first, here, head, part, unit, w, u, kd, decay, scale, snapshots, heads, chunks, D, C, BV, SUMMARY
            )
            done += (here - first) * C
            first = here
            target = export % CUT
            tl.store(recurrent + target * recurrent_slot, (S / unit).to(recurrent.dtype.element_ty))
            if part == 0:
                for which in tl.static_range(3):
                    keep_inputs(
                        which, head, qkv, conv, start, line, resumed, slot, target, qkv_stride, conv_slot, conv_tap,
                        heads * D, D, TAPS, WINDOW,
                    )  # fmt: skip
            export = next_export(export_after, export_slots, exports, export)
    S = through_chunks(
        S, first, after, head, part, unit, w, u, kd, decay, scale, snapshots, heads, chunks, D, C, BV, SUMMARY
    )
    S /= unit
    if SUMMARY:
        if identity:
            tl.store(transitions + matrix, S)
        else:
            tl.store(starts + matrix + heads * D * D, S)
    elif is_last:
        tl.store(state, S.to(recurrent.dtype.element_ty))
        if (part == 0) & (last == stop):
            for which in tl.static_range(3):
                keep_inputs(
                    which, head, qkv, conv, start, stop, resumed, slot, slot, qkv_stride, conv_slot, conv_tap,
                    heads * D, D, TAPS, WINDOW,
                )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots"])
def combine_kernel(slots, first_segment, starts, transitions, heads, D: tl.constexpr, BV: tl.constexpr):
    """starts[s+1] += transitions[s] starts[s], along the segments s of a sequence but the first and the last."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, after = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    if (tl.load(slots + sequence) <= 0) | (after - first < 3):
        return
    key, inner = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    value = part * BV + tl.arange(0, BV)[None, :]
    matrix = ((first + 1).to(tl.int64) * heads + head) * D * D
    S = tl.load(starts + matrix + key * D + value)
    for _ in range(first + 1, after - 1):
        transition = tl.load(transitions + matrix + key * D + inner)
        matrix += heads * D * D
        place = starts + matrix + key * D + value
        S = tl.dot(transition, S, tl.load(place), input_precision="tf32x3")  # fp32 on the tensor cores
        tl.store(place, S)
