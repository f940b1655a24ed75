"""Prefill, first pass: everything about a chunk that does not need the state (docs/kda.md section 6).

`prepare_kernel` convolves, normalises and gates; `intra_kernel`, one program a (chunk, head), then forms
  G = prefix sum of g    P = tril(q~ k^T decays)    M = (I + L)^-1 diag(beta)    W = M (exp(G) k)    U = M v.

Section 7 without a bound on the gate. Split the chunk into blocks of 2b rows, b = 1, 2, 4, .. C/2: each pair of
rows r > c meets in exactly one b where r is in the upper and c in the lower half of the same block. With the
first row of the upper half as the anchor a, exp(G_r - G_c) = exp(G_r - G_a) exp(G_a - G_c), neither exponent
positive, so each level is one tensor-core product of rows scaled by F = exp(-|G - G_a|), masked. No pair is
left over but the diagonal, so no element-wise difference is needed. The same levels invert I + L: with X the
inverse of its block diagonal of b, X - X L_b X is the inverse of the block diagonal of 2b.

G is summed in fp32, in units of log2, each step bounded by -64: nothing is left of what has decayed so far, and
differences of G stay right to 2^-12 after a chunk of nothing but such steps. The rows G_a of a level are read again
from where the first kernel put G; each row is the anchor of one level, so that they are few.

Between the two kernels the operands lie in the tiles that the second one fills in the end (q in q, k in k, v in u)
and G in the snapshots of the next pass. One kernel that did both was slower: unrolled over a chunk its code did not
fit the instruction cache, and at 255 registers too few of its programs fit a multiprocessor to hide the latency of
the loads. For the same reason the second one takes COLUMNS of the D channels at a time.

Operands are fp16 rather than bf16: all but U are bounded by 1 (the recurrence contracts), and three more bits
make the result eight times more accurate. U is stored relative to a power of two, `scale`.

| output  | dtype, shape          | meaning                                              |
| ------- | --------------------- | ---------------------------------------------------- |
| w       | operand [N, H, C, K]  | W                                                    |
| u       | operand [N, H, C, V]  | U / scale                                            |
| q       | operand [N, H, C, K]  | exp(G) q~                                            |
| k       | operand [N, H, C, K]  | exp(G_last - G) k                                    |
| p       | operand [N, H, C, C]  | P, diagonal included                                 |
| decay   | fp32 [N, H, K]        | exp(G_last)                                          |
| scale   | fp32 [H, N]           | power of two not below max abs v of the chunk         |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import LOG2E, decay_between, power_of_two, sigmoid, silu, softplus
from kda_kernels.cuda.rows import rows_of


@triton.jit
def convolved(
    column, weight, qkv, conv, row, valid, back, edge, slot, qkv_stride, conv_slot, conv_tap, TAPS: tl.constexpr
):
    """[rows, D] rows of some columns after convolution and SiLU, fp32.

    weight: [3P, taps]; row: the row in qkv; valid: whether it is of this chunk; back: its distance from
    the sequence's start; edge: whether taps reach before that start and must come from the conv state.
    """
    y = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for tap in tl.static_range(TAPS):
        reach = TAPS - 1 - tap
        place = qkv + (row - reach)[:, None] * qkv_stride + column[None, :]
        x = tl.load(place, mask=(valid & (back >= reach))[:, None], other=0.0)
        y += x.to(tl.float32) * tl.load(weight + column * TAPS + tap).to(tl.float32)[None, :]
    if edge:
        for tap in tl.static_range(TAPS - 1):
            reach = TAPS - 1 - tap
            place = conv + slot * conv_slot + (back + tap)[:, None] * conv_tap + column[None, :]
            x = tl.load(place, mask=(valid & (back < reach))[:, None], other=0.0)
            y += x.to(tl.float32) * tl.load(weight + column * TAPS + tap).to(tl.float32)[None, :]
    return silu(y)


@triton.jit(do_not_specialize=["begin", "end"], do_not_specialize_on_alignment=["slots"])
def prepare_kernel(
    qkv, forget, conv_weight, a_log, dt_bias, conv, slots, resume, cu_seqlens, chunk_sequence, first_chunk,
    q, k, v, sums, v_scales,
    begin, end, qkv_stride, forget_stride, conv_slot, conv_tap, heads,
    D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
    QKV_ALIGN: tl.constexpr, FORGET_ALIGN: tl.constexpr,
):  # fmt: skip
    """One of q, k, v and the sums of g for one (chunk, head), BLOCK rows at a time."""
    # By itself Triton sees only multiples of 16, and reads rows of any other stride one element at a time.
    qkv_stride = tl.multiple_of(qkv_stride.to(tl.int64), QKV_ALIGN)
    forget_stride = tl.multiple_of(forget_stride.to(tl.int64), FORGET_ALIGN)
    part, head = tl.program_id(0), tl.program_id(1)
    chunk, part = (part // 4).to(tl.int64), part % 4
    sequence = tl.load(chunk_sequence + chunk)
    if sequence < 0:
        return
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot <= 0:
        return
    start, first, last, _ = rows_of(cu_seqlens, sequence, begin, end, C)
    base = first + (chunk.to(tl.int32) - tl.load(first_chunk + sequence)) * C
    resumed = tl.load(resume + sequence) != 0
    operand = q.dtype.element_ty
    channel = tl.arange(0, D)
    column = head * D + channel
    tile = (chunk * heads + head) * C
    if part == 3:
        rate = tl.exp2(tl.load(a_log + head).to(tl.float32) * LOG2E) * LOG2E
        bias = tl.load(dt_bias + column).to(tl.float32)[None, :]
        before = tl.zeros([D], tl.float32)
        for block in range(0, C, BLOCK):
            r = block + tl.arange(0, BLOCK)
            valid = base + r < last
            place = (base + r).to(tl.int64)[:, None] * forget_stride + column[None, :]
            z = tl.load(forget + place, mask=valid[:, None], other=0.0).to(tl.float32)
            # 2^-64 of anything is nothing: the bound keeps the sums, hence their rounding, small.
            g = tl.maximum(-rate * softplus(z + bias), -64.0)
            g = tl.where(valid[:, None], g, 0.0)
            tl.store(sums + (tile + r)[:, None] * D + channel[None, :], before[None, :] + tl.cumsum(g, 0))
            before += tl.sum(g, 0)
        return
    column += part * heads * D
    for block in range(0, C, BLOCK):
        r = block + tl.arange(0, BLOCK)
        edge = resumed & (base + block - start < TAPS - 1)
        x = convolved(
            column, conv_weight, qkv, conv, (base + r).to(tl.int64), base + r < last, base + r - start, edge, slot,
            qkv_stride, conv_slot, conv_tap, TAPS,
        )  # fmt: skip
        place = (tile + r)[:, None] * D + channel[None, :]
        if part == 2:
            v_scale = power_of_two(tl.max(tl.abs(x), 1))
            tl.store(v + place, (x * (1.0 / v_scale)[:, None]).to(operand))
            tl.store(v_scales + tile + r, v_scale)
        else:
            scale = tl.rsqrt(tl.sum(x * x, 1) + 1e-6) * tl.where(part == 0, D**-0.5, 1.0)
            tl.store(tl.where(part == 0, q, k) + place, (x * scale[:, None]).to(operand))


@triton.jit(do_not_specialize=["begin", "end", "chunks"], do_not_specialize_on_alignment=["slots"])
def intra_kernel(
    beta, slots, cu_seqlens, chunk_sequence, first_chunk,
    w, u, qd, kd, p, decay, scale, sums, v_scales,
    begin, end, beta_stride, heads, chunks,
    D: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = tl.load(chunk_sequence + chunk)
    if sequence < 0:
        return
    if tl.load(slots + sequence) <= 0:
        return
    operand = w.dtype.element_ty
    _, first, last, _ = rows_of(cu_seqlens, sequence, begin, end, C)
    base = first + (chunk.to(tl.int32) - tl.load(first_chunk + sequence)) * C
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    # One 32-bit offset serves all tiles: addresses are registers too.
    tile = (chunk * heads + head) * C
    square = i * C + j
    qd, kd, w, u = qd + tile * D, kd + tile * D, w + tile * D, u + tile * D
    sums, p, decay = sums + tile * D, p + tile * C, decay + (chunk * heads + head) * D
    products = tl.zeros([C, C], operand)
    lower = tl.zeros([C, C], operand)
    for columns in range(0, D, COLUMNS):
        channel = columns + tl.arange(0, COLUMNS)
        part = i * D + channel[None, :]
        q, k, G = tl.load(qd + part), tl.load(kd + part), tl.load(sums + part)
        total = tl.load(sums + (C - 1) * D + channel)
        tl.debug_barrier()  # from here on the tiles that held the operands are overwritten
        tl.store(decay + channel, tl.exp2(total))
        tl.store(kd + part, tl.exp2(total[None, :] - G).to(operand) * k)
        prefix = tl.exp2(G).to(operand)
        tl.store(qd + part, prefix * q)
        tl.store(w + part, prefix * k)
        diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        products = tl.where(i == j, products + diagonal[:, None], products).to(operand)
        for level in range(LEVELS):
            half = 1 << level
            anchor = (i & -2 * half) + half
            factor = decay_between(G, tl.load(sums + anchor * D + channel[None, :])).to(operand)
            k_scaled = k * factor
            k_across = tl.trans(k_scaled)
            # i and j in different halves of one block: level is the highest bit in which they differ.
            pair = (i ^ j) >> level == 1
            product = tl.dot(q * factor, k_across, input_precision="ieee")
            products = tl.where(pair, products + product, products).to(operand)
            product = tl.dot(k_scaled, k_across, input_precision="ieee")
            lower = tl.where(pair, lower + product, lower).to(operand)
    tl.store(p + square, tl.where(i >= j, products, 0.0))

    valid = base + r < last
    b = tl.load(beta + (base + r).to(tl.int64) * beta_stride + head, mask=valid, other=0.0).to(tl.float32)
    b = tl.where(valid, sigmoid(b), 0.0)
    lower = (lower * b[:, None]).to(operand)
    inverse = tl.where(i == j, 1.0, 0.0).to(operand)
    for level in range(LEVELS):
        pair = ((i ^ j) >> level == 1) & (i > j)
        step = tl.dot(inverse, tl.where(pair, lower, 0.0), input_precision="ieee").to(operand)
        inverse = tl.where(pair, -tl.dot(step, inverse, input_precision="ieee"), inverse).to(operand)

    wide = i * D + tl.arange(0, D)[None, :]
    mixing = inverse * b[None, :]
    tl.debug_barrier()
    k_decayed, v = tl.load(w + wide), tl.load(u + wide)
    tl.debug_barrier()
    tl.store(w + wide, tl.dot(mixing.to(operand), k_decayed, input_precision="ieee").to(operand))
    v_scale = tl.load(v_scales + tile + r)
    largest = tl.max(v_scale, 0)
    mixing *= (v_scale / largest)[None, :]
    tl.store(u + wide, tl.dot(mixing.to(operand), v, input_precision="ieee").to(operand))
    tl.store(scale + head * chunks + chunk, largest)
