"""Prefill, first pass: rows convolved, normalised and gated, each for itself (docs/kda.md sections 2 to 4).

One warp takes q, k, v or the gate of a (chunk, head), row after row. A row is a vector whose channels lie across the
warp's lanes: what the convolution shares with the rows before, and the prefix sum of the gate, stay in registers, and
no barrier is needed. GROUP rows are read before the first of them is worked on, for no compiler reads ahead across
a store.

The results lie where the next pass overwrites them with its own: q in q, k in k, v in u, sums of g in the snapshots.

| output    | dtype, shape         | meaning                                                            |
| --------- | -------------------- | ------------------------------------------------------------------ |
| q, k      | operand [N, H, C, K] | q~ and k                                                           |
| v         | operand [N, H, C, V] | v / v_scales                                                       |
| sums      | fp32 [N, H, C, K]    | prefix sums of g in units of log2, every step bounded by -64       |
| strengths | fp32 [N, H, C]       | beta, 0 beyond the sequence                                        |
| v_scales  | fp32 [N, H, C]       | power of two not below max abs v of the row                        |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import LOG2E, power_of_two, sigmoid, silu, softplus
from kda_kernels.cuda.rows import rows_of


@triton.jit
def some(channel, condition):
    """A mask of all channels, or of none."""
    return channel < tl.where(condition, channel.shape[0], 0)


@triton.jit(do_not_specialize=["begin", "end"], do_not_specialize_on_alignment=["slots"])
def prepare_kernel(
    qkv, forget, beta, conv_weight, a_log, dt_bias, conv, slots, resume, cu_seqlens, chunk_sequence, first_chunk,
    q, k, v, sums, strengths, v_scales,
    begin, end, qkv_stride, forget_stride, beta_stride, conv_slot, conv_tap, heads,
    D: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, TAPS: tl.constexpr,
    QKV_ALIGN: tl.constexpr, FORGET_ALIGN: tl.constexpr,
):  # fmt: skip
    """Program (4 chunk + part, head): part 0 is q, 1 k, 2 v and 3 the gate."""
    # By itself Triton sees only multiples of 16, and reads rows of any other stride one element at a time.
    qkv_stride = tl.multiple_of(qkv_stride.to(tl.int64), QKV_ALIGN)
    forget_stride = tl.multiple_of(forget_stride.to(tl.int64), FORGET_ALIGN)
    chunk, part, head = (tl.program_id(0) // 4).to(tl.int64), tl.program_id(0) % 4, tl.program_id(1)
    sequence = tl.load(chunk_sequence + chunk)
    if sequence < 0:
        return
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot <= 0:
        return
    start, first, last, _ = rows_of(cu_seqlens, sequence, begin, end, C)
    base = first + (chunk.to(tl.int32) - tl.load(first_chunk + sequence)) * C
    channel = tl.arange(0, D)
    column = head * D + channel
    tile = (chunk * heads + head) * C
    if part == 3:
        line = base + tl.arange(0, C)
        strength = tl.load(beta + line.to(tl.int64) * beta_stride + head, mask=line < last, other=0.0)
        strength = tl.where(line < last, sigmoid(strength.to(tl.float32)), 0.0)
        tl.store(strengths + tile + tl.arange(0, C), strength)
        rate = tl.exp2(tl.load(a_log + head).to(tl.float32) * LOG2E) * LOG2E
        bias = tl.load(dt_bias + column).to(tl.float32)
        total = tl.zeros([D], tl.float32)
        for group in range(0, C, GROUP):
            gates: tl.tuple = ()
            for i in tl.static_range(GROUP):
                row = base + group + i
                place = forget + row.to(tl.int64) * forget_stride + column
                gates += (tl.load(place, mask=some(channel, row < last), other=0.0).to(tl.float32),)
            for i in tl.static_range(GROUP):
                # 2^-64 of anything is nothing: the bound keeps the sums, hence their rounding, small.
                g = tl.maximum(-rate * softplus(gates[i] + bias), -64.0)
                total += g * tl.where(base + group + i < last, 1.0, 0.0)
                tl.store(sums + (tile + group + i) * D + channel, total)
        return
    column += part * heads * D
    weights: tl.tuple = ()
    for tap in tl.static_range(TAPS):
        weights += (tl.load(conv_weight + column * TAPS + tap).to(tl.float32),)
    operand = q.dtype.element_ty
    resumed = tl.load(resume + sequence) != 0
    for group in range(0, C, GROUP):
        x: tl.tuple = ()
        for i in tl.static_range(1 - TAPS, 0):
            row = base + group + i
            here = some(channel, (row >= start) & (row < last))
            before = tl.load(qkv + row.to(tl.int64) * qkv_stride + column, mask=here, other=0.0)
            if resumed & (row < start):
                before = tl.load(conv + slot * conv_slot + (row - start + TAPS - 1) * conv_tap + column)
            x += (before.to(tl.float32),)
        for i in tl.static_range(GROUP):
            row = base + group + i
            this = tl.load(qkv + row.to(tl.int64) * qkv_stride + column, mask=some(channel, row < last), other=0.0)
            x += (this.to(tl.float32),)
        y: tl.tuple = ()
        for i in tl.static_range(GROUP):
            convolved = x[i] * weights[0]
            for tap in tl.static_range(1, TAPS):
                convolved += x[i + tap] * weights[tap]
            y += (silu(convolved) * tl.where(base + group + i < last, 1.0, 0.0),)
        for i in tl.static_range(GROUP):
            place = (tile + group + i) * D + channel
            if part == 2:
                scale = power_of_two(tl.max(tl.abs(y[i]), 0))
                tl.store(v + place, (y[i] * (1.0 / scale)).to(operand))
                tl.store(v_scales + tile + group + i, scale)
            else:
                scale = tl.rsqrt(tl.sum(y[i] * y[i], 0) + 1e-6) * tl.where(part == 0, D**-0.5, 1.0)
                tl.store(tl.where(part == 0, q, k) + place, (y[i] * scale).to(operand))
