"""Prefill, last pass: O = (exp(G) q~) S + P N, then the gated norm (docs/kda.md sections 5 and 6).

One program serves one (chunk, head), all in parallel. Arguments as in the other two passes;
gate [T, P] and out [T, P] are activations with any row stride.
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import sigmoid
from kda_kernels.cuda.rows import rows_of


@triton.jit(do_not_specialize=["begin", "end", "length"], do_not_specialize_on_alignment=["slots"])
def output_kernel(
    gate, norm_weight, slots, cu_seqlens, chunk_sequence, first_chunk, first_segment, qd, p, u, snapshots, units, out,
    begin, end, length, gate_stride, out_stride, norm_eps, heads,
    D: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = tl.load(chunk_sequence + chunk)
    if sequence < 0:
        return
    _, first, last, _ = rows_of(cu_seqlens, sequence, begin, end, C)
    row = tl.arange(0, C)[:, None]
    value = tl.arange(0, D)[None, :]
    number = chunk.to(tl.int32) - tl.load(first_chunk + sequence)
    line = first + number * C + row
    place = out + line.to(tl.int64) * out_stride + head * D + value
    if tl.load(slots + sequence) <= 0:
        tl.store(place, tl.zeros([C, D], out.dtype.element_ty), mask=line < last)
        return
    tile = chunk * heads + head
    queries = tl.load(qd + (tile * C + row) * D + value)
    state = tl.load(snapshots + tile * D * D + tl.arange(0, D)[:, None] * D + value)
    o = tl.dot(queries, state, input_precision="ieee")
    products = tl.load(p + (tile * C + row) * C + tl.arange(0, C)[None, :])
    written = tl.load(u + (tile * C + row) * D + value)
    o = tl.dot(products, written, o, input_precision="ieee")
    segment = sequence
    if SEGMENTS:
        segment = tl.load(first_segment + sequence) + number // length
    o /= tl.load(units + (segment * heads + head) * (D // BV) + value // BV)
    o *= tl.rsqrt(tl.sum(o * o, 1) / D + norm_eps)[:, None] * tl.load(norm_weight + value).to(tl.float32)
    logits = tl.load(gate + line.to(tl.int64) * gate_stride + head * D + value, mask=line < last, other=0.0)
    tl.store(place, (o * sigmoid(logits.to(tl.float32))).to(out.dtype.element_ty), mask=line < last)
