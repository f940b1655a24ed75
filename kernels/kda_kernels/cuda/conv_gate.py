"""Prefill, first pass: tokens convolved, normalised and gated, each for itself (docs/kda.md sections 2 to 4).

One warp takes q, k, v or the gate of a (chunk, head), token after token. A token is a vector whose channels lie across
the warp's lanes: what the convolution shares with the tokens before, and the prefix sum of the gate, stay in registers,
and no barrier is needed. GROUP tokens are read before the first of them is worked on, for no compiler reads ahead
across a store.

The results lie where the next pass overwrites them with its own: q in qg, k in kg, v in u, g_cumsum in the memory of h.

| output   | dtype, shape               | meaning                                                      |
| -------- | -------------------------- | ------------------------------------------------------------ |
| q, k     | operand [chunks, H, BT, K] | normalised, q scaled                                         |
| v        | operand [chunks, H, BT, V] | v / v_scales                                                 |
| g_cumsum | fp32 [chunks, H, BT, K]    | prefix sums of g in units of log2, every step bounded by -64 |
| beta_out | fp32 [chunks, H, BT]       | sigmoid(beta), 0 beyond the sequence                         |
| v_scales | fp32 [chunks, H, BT]       | power of two not below max abs v of the token                |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import LOG2E, power_of_two, sigmoid, silu, softplus
from kda_kernels.cuda.index import token_range


@triton.jit
def some(channel, condition):
    """A mask of all channels, or of none."""
    return channel < tl.where(condition, channel.shape[0], 0)


@triton.jit(do_not_specialize=["begin", "end"], do_not_specialize_on_alignment=["state_indices"])
def kda_conv_gate_kernel(
    qkv, g, beta, conv_weight, A_log, dt_bias, conv_state, state_indices, has_initial_state,
    cu_seqlens, chunk_seq_idx, chunk_offsets, q, k, v, g_cumsum, beta_out, v_scales,
    begin, end, qkv_stride, g_stride, beta_stride, conv_state_stride, conv_token_stride, heads,
    D: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    QKV_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
):  # fmt: skip
    """Program (4 chunk + part, head): part 0 is q, 1 k, 2 v and 3 the gate."""
    # By itself Triton sees only multiples of 16, and reads tokens of any other stride one element at a time.
    qkv_stride = tl.multiple_of(qkv_stride.to(tl.int64), QKV_ALIGN)
    g_stride = tl.multiple_of(g_stride.to(tl.int64), G_ALIGN)
    chunk, part, head = (tl.program_id(0) // 4).to(tl.int64), tl.program_id(0) % 4, tl.program_id(1)
    sequence = tl.load(chunk_seq_idx + chunk)
    if sequence < 0:
        return
    state_index = tl.load(state_indices + sequence).to(tl.int64)
    if state_index <= 0:
        return
    start, first, last, _ = token_range(cu_seqlens, sequence, begin, end, BT)
    base = first + (chunk.to(tl.int32) - tl.load(chunk_offsets + sequence)) * BT
    channel = tl.arange(0, D)
    column = head * D + channel
    tile = (chunk * heads + head) * BT
    if part == 3:
        tokens = base + tl.arange(0, BT)
        b_beta = tl.load(beta + tokens.to(tl.int64) * beta_stride + head, mask=tokens < last, other=0.0)
        b_beta = tl.where(tokens < last, sigmoid(b_beta.to(tl.float32)), 0.0)
        tl.store(beta_out + tile + tl.arange(0, BT), b_beta)
        rate = tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E) * LOG2E
        bias = tl.load(dt_bias + column).to(tl.float32)
        total = tl.zeros([D], tl.float32)
        for group in range(0, BT, GROUP):
            projected: tl.tuple = ()
            for i in tl.static_range(GROUP):
                token = base + group + i
                place = g + token.to(tl.int64) * g_stride + column
                projected += (tl.load(place, mask=some(channel, token < last), other=0.0).to(tl.float32),)
            for i in tl.static_range(GROUP):
                # 2^-64 of anything is nothing: the bound keeps the sums, hence their rounding, small.
                log_decay = tl.maximum(-rate * softplus(projected[i] + bias), -64.0)
                total += log_decay * tl.where(base + group + i < last, 1.0, 0.0)
                tl.store(g_cumsum + (tile + group + i) * D + channel, total)
        return
    column += part * heads * D
    weights: tl.tuple = ()
    for tap in tl.static_range(W):
        weights += (tl.load(conv_weight + column * W + tap).to(tl.float32),)
    operand = q.dtype.element_ty
    use_initial_state = tl.load(has_initial_state + sequence) != 0
    for group in range(0, BT, GROUP):
        x: tl.tuple = ()
        for i in tl.static_range(1 - W, 0):
            token = base + group + i
            here = some(channel, (token >= start) & (token < last))
            before = tl.load(qkv + token.to(tl.int64) * qkv_stride + column, mask=here, other=0.0)
            if use_initial_state & (token < start):
                past = conv_state + state_index * conv_state_stride + (token - start + W - 1) * conv_token_stride
                before = tl.load(past + column)
            x += (before.to(tl.float32),)
        for i in tl.static_range(GROUP):
            token = base + group + i
            this = tl.load(qkv + token.to(tl.int64) * qkv_stride + column, mask=some(channel, token < last), other=0.0)
            x += (this.to(tl.float32),)
        y: tl.tuple = ()
        for i in tl.static_range(GROUP):
            convolved = x[i] * weights[0]
            for tap in tl.static_range(1, W):
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
