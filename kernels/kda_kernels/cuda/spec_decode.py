"""Decode of several tokens a sequence in one launch, every token's state kept in a slot of its own.

One program serves one (sequence, head), token by token, with the arithmetic of `decode`: where the tile is the whole
state it stays in registers from token to token, otherwise the next token reads what the last one stored, from the
L2 cache. So k tokens read one state and write k, where k steps of decode read k. Arguments as in `decode`, but

| argument | dtype, shape | meaning                                                               |
| -------- | ------------ | --------------------------------------------------------------------- |
| slots    | int32 [N, K] | the state after token i goes to slots[n, i]; slots[n, 0] <= 0: null    |
| accepted | int32 [N]    | the state before the first token is in slots[n, accepted[n] - 1]      |
"""

import triton
import triton.language as tl

from kda_kernels.cuda.decode import VALUES_AT, _advance, _cells, _convolve, _finish, _gates, _keep, _launch
from kda_kernels.interface import SpecDecodeArgs

REGISTERS = 168  # with fewer its loop over tokens spills


def spec_decode(args: SpecDecodeArgs) -> None:
    """Up to Q tokens of N sequences.

    One launch, no allocation, no synchronisation: safe to capture in a CUDA graph. The values of the tables are not
    checked. To the bit what `decode` gives for as many sequences, one token a call.
    """
    inputs, params, state, out = args.inputs, args.params, args.state, args.out
    num_sequences, max_query_len = args.state_indices.shape
    num_tokens, heads, dim = inputs.qkv.shape[0], params.heads, params.head_dim
    if num_sequences == 0:
        out.zero_()
        return
    _spec_decode[(heads, num_sequences)](
        *(inputs.qkv, inputs.g, inputs.beta, inputs.output_gate),
        *(params.conv_weight, params.A_log, params.dt_bias, params.norm_weight),
        *(state.conv, state.recurrent, args.cu_seqlens, args.state_indices, args.num_accepted_tokens, out),
        *(inputs.qkv.stride(0), inputs.g.stride(0), inputs.beta.stride(0), inputs.output_gate.stride(0)),
        *(state.conv.stride(0), state.conv.stride(1), state.recurrent.stride(0), out.stride(0)),
        *(params.norm_eps, heads, num_tokens, num_sequences, max_query_len),
        D=dim,
        TAPS=params.conv_kernel_size,
        VALUES_AT=VALUES_AT,
        **_launch(num_sequences * heads, dim, state.recurrent.dtype.itemsize < 4, registers=REGISTERS),
    )


@triton.jit(do_not_specialize=["rows", "sequences"], do_not_specialize_on_alignment=["slots"])
def _spec_decode(
    qkv, forget, beta, gate, conv_weight, a_log, dt_bias, norm_weight, conv, recurrent, cu_seqlens, slots, accepted,
    out, qkv_stride, forget_stride, beta_stride, gate_stride, conv_slot, conv_tap, recurrent_slot, out_stride,
    norm_eps, heads, rows, sequences, steps,
    D: tl.constexpr, INNER: tl.constexpr, TAPS: tl.constexpr, VALUES_AT: tl.constexpr, BV: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    P, first = heads * D, head * D
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    out += first
    place, nothing = tl.arange(0, D), tl.zeros([D], out.dtype.element_ty)
    for rest in range(tl.load(cu_seqlens + sequences) + sequence, rows, sequences):  # padding, shared among all
        tl.store(out + rest * out_stride.to(tl.int64) + place, nothing)
    start = tl.load(cu_seqlens + sequence)
    tokens = tl.load(cu_seqlens + sequence + 1) - start
    start = start.to(tl.int64)
    slots += sequence * steps
    if tl.load(slots) <= 0:
        for step in range(tokens):
            tl.store(out + (start + step) * out_stride + place, nothing)
        return
    if tokens == 0:
        return
    from_step = tl.load(accepted + sequence) - 1
    origin = tl.load(slots + from_step).to(tl.int64)
    recurrent += first * D
    cell = _cells(D, INNER, BV, VALUES_AT)
    source = recurrent + origin * recurrent_slot
    tile = tl.load(source + cell)
    qkv += start * qkv_stride + first
    conv += first
    past = conv + origin * conv_slot
    weight = conv_weight + first * TAPS
    for step in range(tokens):
        row = start + step
        q = _convolve(qkv, past, weight, step, qkv_stride, conv_tap, D, TAPS)
        k = _convolve(qkv + P, past + P, weight + P * TAPS, step, qkv_stride, conv_tap, D, TAPS)
        v = _convolve(qkv + 2 * P, past + 2 * P, weight + 2 * P * TAPS, step, qkv_stride, conv_tap, D, TAPS)
        alpha, b, scale = _gates(
            forget + row * forget_stride + first, beta + row * beta_stride + head, gate + row * gate_stride + first,
            dt_bias + first, a_log + head, norm_weight, D, BV,
        )  # fmt: skip
        target = recurrent + tl.load(slots + step).to(tl.int64) * recurrent_slot
        o, tile = _advance(tile, source + cell, target + cell, q, k, v, alpha, b, D, INNER, BV, VALUES_AT)
        _finish(o, scale, out + row * out_stride, norm_eps, D, BV)
        if BV < D:
            tl.debug_barrier()  # what all threads stored, all may load
            tile = tl.load(target + cell)
            source = target
    # The windows last, and last of them the one that goes where the first came from.
    for i in range(tokens):
        step = (from_step + 1 + i) % tokens
        kept = conv + tl.load(slots + step).to(tl.int64) * conv_slot
        for part in tl.static_range(3):
            _keep(qkv + part * P, past + part * P, kept + part * P, step, qkv_stride, conv_tap, D, TAPS)
