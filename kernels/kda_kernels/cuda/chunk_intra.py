"""Prefill, second pass: everything about a chunk that does not need the state (docs/kda.md section 6).

One program serves a (chunk, head), whose tokens `conv_gate` has left in qg (q), kg (k), u (v) and g_cumsum (G):
  Aqk = tril(q k^T decays)    M = (I + L)^-1 diag(beta)    w = M (exp(G) k)    u = M v.

Section 7 without a bound on the gate. Split the chunk into blocks of 2b tokens, b = 1, 2, 4, .. BT/2: each pair of
tokens r > c meets in exactly one b where r is in the upper and c in the lower half of the same block. With the
first token of the upper half as the anchor a, exp(G_r - G_c) = exp(G_r - G_a) exp(G_a - G_c), neither exponent
positive, so each level is one tensor-core product of rows scaled by F = exp(-|G - G_a|), masked. No pair is
left over but the diagonal, so no element-wise difference is needed. The same levels invert I + L: with X the
inverse of its block diagonal of b, X - X L_b X is the inverse of the block diagonal of 2b. As X has nothing outside
its blocks, L itself may stand for L_b: what else X L X brings is masked.

G is summed in fp32, in units of log2, each step bounded by -64: nothing is left of what has decayed so far, and
differences of G stay right to 2^-12 after a chunk of nothing but such steps. The rows G_a of a level are read again
from g_cumsum; each row is the anchor of one level, so that they are few.

It is a kernel of its own, for one that also did the work of `conv_gate` was slower: unrolled over a chunk its code did
not fit the instruction cache. It takes BK of the D channels at a time, for with all of them registers spill.

Operands are fp16 rather than bf16: all but u are bounded by 1 (the recurrence contracts), and three more bits
make the result eight times more accurate. u is stored relative to a power of two, `u_scale`.

| output  | dtype, shape                | meaning                                       |
| ------- | --------------------------- | --------------------------------------------- |
| w       | operand [chunks, H, BT, K]  | M (exp(G) k)                                  |
| u       | operand [chunks, H, BT, V]  | M v / u_scale                                 |
| qg      | operand [chunks, H, BT, K]  | exp(G) q                                      |
| kg      | operand [chunks, H, BT, K]  | exp(G_last - G) k                             |
| Aqk     | operand [chunks, H, BT, BT] | diagonal included                             |
| decay   | fp32 [chunks, H, K]         | exp(G_last)                                   |
| u_scale | fp32 [H, chunks]            | power of two not below max abs v of the chunk |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import decay_between


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["state_indices"])
def kda_chunk_intra_kernel(
    state_indices, chunk_seq_idx, w, u, qg, kg, Aqk, decay, u_scale, g_cumsum, beta, v_scales, heads, chunks,
    D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = tl.load(chunk_seq_idx + chunk)
    if sequence < 0:
        return
    if tl.load(state_indices + sequence) <= 0:
        return
    operand = w.dtype.element_ty
    r = tl.arange(0, BT)
    i, j = r[:, None], r[None, :]
    # One 32-bit offset serves all tiles: addresses are registers too.
    tile = (chunk * heads + head) * BT
    square = i * BT + j
    qg, kg, w, u = qg + tile * D, kg + tile * D, w + tile * D, u + tile * D
    g_cumsum, Aqk, decay = g_cumsum + tile * D, Aqk + tile * BT, decay + (chunk * heads + head) * D
    products = tl.zeros([BT, BT], operand)
    lower = tl.zeros([BT, BT], operand)
    for columns in range(0, D, BK):
        channel = columns + tl.arange(0, BK)
        part = i * D + channel[None, :]
        q, k, G = tl.load(qg + part), tl.load(kg + part), tl.load(g_cumsum + part)
        total = tl.load(g_cumsum + (BT - 1) * D + channel)
        tl.debug_barrier()  # from here on the tiles that held the operands are overwritten
        tl.store(decay + channel, tl.exp2(total))
        tl.store(kg + part, tl.exp2(total[None, :] - G).to(operand) * k)
        prefix = tl.exp2(G).to(operand)
        tl.store(qg + part, prefix * q)
        tl.store(w + part, prefix * k)
        diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        products = tl.where(i == j, products + diagonal[:, None], products).to(operand)
        for level in range(LEVELS):
            half = 1 << level
            anchor = (i & -2 * half) + half
            factor = decay_between(G, tl.load(g_cumsum + anchor * D + channel[None, :]), operand)
            k_scaled = k * factor
            k_across = tl.trans(k_scaled)
            # i and j in different halves of one block: `half` is the highest bit in which they differ. As products
            # are at most 1, a factor does for a condition, and takes two at a time.
            pair = tl.where((i ^ j) & -half == half, 1.0, 0.0).to(operand)
            product = tl.dot(q * factor, k_across, input_precision="ieee")
            products += product.to(operand) * pair
            product = tl.dot(k_scaled, k_across, input_precision="ieee")
            lower += product.to(operand) * pair
    tl.store(Aqk + square, tl.where(i >= j, products, 0.0))

    b = tl.load(beta + tile + r)
    lower = tl.where(i > j, lower * b[:, None], 0.0).to(operand)
    inverse = tl.where(i == j, 1.0, 0.0).to(operand)
    for level in range(LEVELS):
        half = 1 << level
        pair = (i ^ j) & -half == half
        step = tl.dot(inverse, lower, input_precision="ieee").to(operand)
        inverse -= tl.where(pair, tl.dot(step, inverse, input_precision="ieee"), 0.0).to(operand)

    wide = i * D + tl.arange(0, D)[None, :]
    mixing = inverse * b[None, :]
    tl.debug_barrier()
    k_decayed, v = tl.load(w + wide), tl.load(u + wide)
    tl.debug_barrier()
    tl.store(w + wide, tl.dot(mixing.to(operand), k_decayed, input_precision="ieee").to(operand))
    v_scale = tl.load(v_scales + tile + r)
    largest = tl.max(v_scale, 0)
    mixing *= (v_scale * (1.0 / largest))[None, :]
    tl.store(u + wide, tl.dot(mixing.to(operand), v, input_precision="ieee").to(operand))
    tl.store(u_scale + head * chunks + chunk, largest)
