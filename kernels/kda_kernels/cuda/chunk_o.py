"""Prefill, last pass: o = qg h + Aqk v_new, then the gated norm (docs/kda.md sections 5 and 6).

One program serves one (chunk, head), all in parallel. Arguments as in the passes before; u holds v_new by now.
output_gate [T, P] and out [T, P] are activations with any stride between tokens.
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import sigmoid
from kda_kernels.cuda.index import token_range


@triton.jit(do_not_specialize=["begin", "end", "length"], do_not_specialize_on_alignment=["state_indices"])
def kda_chunk_o_kernel(
    output_gate, norm_weight, state_indices, cu_seqlens, chunk_seq_idx, chunk_offsets, segment_offsets,
    qg, Aqk, u, h, h_scale, out, begin, end, length, output_gate_stride, out_stride, norm_eps, heads,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = tl.load(chunk_seq_idx + chunk)
    if sequence < 0:
        return
    _, first, last, _ = token_range(cu_seqlens, sequence, begin, end, BT)
    row = tl.arange(0, BT)[:, None]
    value = tl.arange(0, D)[None, :]
    number = chunk.to(tl.int32) - tl.load(chunk_offsets + sequence)
    token = first + number * BT + row
    place = out + token.to(tl.int64) * out_stride + head * D + value
    if tl.load(state_indices + sequence) <= 0:
        tl.store(place, tl.zeros([BT, D], out.dtype.element_ty), mask=token < last)
        return
    tile = chunk * heads + head
    b_qg = tl.load(qg + (tile * BT + row) * D + value)
    b_h = tl.load(h + tile * D * D + tl.arange(0, D)[:, None] * D + value)
    o = tl.dot(b_qg, b_h, input_precision="ieee")
    b_Aqk = tl.load(Aqk + (tile * BT + row) * BT + tl.arange(0, BT)[None, :])
    v_new = tl.load(u + (tile * BT + row) * D + value)
    o = tl.dot(b_Aqk, v_new, o, input_precision="ieee")
    segment = sequence
    if SEGMENTS:
        segment = tl.load(segment_offsets + sequence) + number // length
    o /= tl.load(h_scale + (segment * heads + head) * (D // BV) + value // BV)
    o *= tl.rsqrt(tl.sum(o * o, 1) / D + norm_eps)[:, None] * tl.load(norm_weight + value).to(tl.float32)
    logits = tl.load(
        output_gate + token.to(tl.int64) * output_gate_stride + head * D + value, mask=token < last, other=0.0
    )
    tl.store(place, (o * sigmoid(logits.to(tl.float32))).to(out.dtype.element_ty), mask=token < last)
