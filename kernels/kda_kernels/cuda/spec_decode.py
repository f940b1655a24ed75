"""Decode of several tokens a sequence in one launch, the state after each of them kept.

One program serves one (sequence, head), token by token, with the arithmetic of `decode`: where the tile is the whole
state it stays in registers from token to token, otherwise the next token reads what the last one stored, from the
L2 cache. So k tokens read one state and write k, where k steps of decode read k. Arguments as in `decode`, with the
tables of `SpecDecodeArgs`.
"""

import triton
import triton.language as tl

from kda_kernels.cuda.decode import (
    VALUES_AT,
    _causal_conv1d,
    _gated_norm,
    _gates,
    _launch,
    _recurrent_step,
    _state_offsets,
    _store_conv_state,
)
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
    kda_spec_decode_kernel[(heads, num_sequences)](
        *(inputs.qkv, inputs.g, inputs.beta, inputs.output_gate),
        *(params.conv_weight, params.A_log, params.dt_bias, params.norm_weight),
        *(state.conv, state.recurrent, args.cu_seqlens, args.state_indices, args.num_accepted_tokens, out),
        *(inputs.qkv.stride(0), inputs.g.stride(0), inputs.beta.stride(0), inputs.output_gate.stride(0)),
        *(state.conv.stride(0), state.conv.stride(1), state.recurrent.stride(0), out.stride(0)),
        *(params.norm_eps, heads, num_tokens, num_sequences, max_query_len),
        D=dim,
        W=params.conv_kernel_size,
        VALUES_AT=VALUES_AT,
        **_launch(num_sequences * heads, dim, state.recurrent.dtype.itemsize < 4, registers=REGISTERS),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"], do_not_specialize_on_alignment=["state_indices"])
def kda_spec_decode_kernel(
    qkv, g, beta, output_gate, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state,
    cu_seqlens, state_indices, num_accepted_tokens, out, qkv_stride, g_stride, beta_stride, output_gate_stride,
    conv_state_stride, conv_token_stride, recurrent_state_stride, out_stride, norm_eps, heads,
    num_tokens, num_sequences, max_query_len,
    D: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, VALUES_AT: tl.constexpr, BV: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    P, first = heads * D, head * D
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    out += first
    place, nothing = tl.arange(0, D), tl.zeros([D], out.dtype.element_ty)
    for rest in range(tl.load(cu_seqlens + num_sequences) + sequence, num_tokens, num_sequences):  # padding
        tl.store(out + rest * out_stride.to(tl.int64) + place, nothing)
    start = tl.load(cu_seqlens + sequence)
    query_len = tl.load(cu_seqlens + sequence + 1) - start
    start = start.to(tl.int64)
    state_indices += sequence * max_query_len
    if tl.load(state_indices) <= 0:
        for step in range(query_len):
            tl.store(out + (start + step) * out_stride + place, nothing)
        return
    if query_len == 0:
        return
    from_step = tl.load(num_accepted_tokens + sequence) - 1
    origin = tl.load(state_indices + from_step).to(tl.int64)
    recurrent_state += first * D
    cell = _state_offsets(D, INNER, BV, VALUES_AT)
    source = recurrent_state + origin * recurrent_state_stride
    tile = tl.load(source + cell)
    qkv += start * qkv_stride + first
    conv_state += first
    past = conv_state + origin * conv_state_stride
    weight = conv_weight + first * W
    for step in range(query_len):
        token = start + step
        q = _causal_conv1d(qkv, past, weight, step, qkv_stride, conv_token_stride, D, W)
        k = _causal_conv1d(qkv + P, past + P, weight + P * W, step, qkv_stride, conv_token_stride, D, W)
        v = _causal_conv1d(qkv + 2 * P, past + 2 * P, weight + 2 * P * W, step, qkv_stride, conv_token_stride, D, W)
        alpha, b, scale = _gates(
            g + token * g_stride + first, beta + token * beta_stride + head,
            output_gate + token * output_gate_stride + first, dt_bias + first, A_log + head, norm_weight, D, BV,
        )  # fmt: skip
        target = recurrent_state + tl.load(state_indices + step).to(tl.int64) * recurrent_state_stride
        o, tile = _recurrent_step(tile, source + cell, target + cell, q, k, v, alpha, b, D, INNER, BV, VALUES_AT)
        _gated_norm(o, scale, out + token * out_stride, norm_eps, D, BV)
        if BV < D:
            tl.debug_barrier()  # what all threads stored, all may load
            tile = tl.load(target + cell)
            source = target
    # The windows last, and last of them the one that goes where the first came from.
    for i in range(query_len):
        step = (from_step + 1 + i) % query_len
        target = conv_state + tl.load(state_indices + step).to(tl.int64) * conv_state_stride
        for part in tl.static_range(3):
            _store_conv_state(
                qkv + part * P, past + part * P, target + part * P, step, qkv_stride, conv_token_stride, D, W
            )
