"""Prefill: runs of tokens of many sequences, in passes over chunks of 64 rows.

  table    which sequence each chunk belongs to                       one small program a sequence
  prepare  convolution, normalisation, gate                           (q, k, v or g of a chunk, head) in parallel
  intra    what a chunk can know without the state                    (chunk, head) in parallel
  states   S from chunk to chunk, and the slots' new states           (value columns, head, sequence)
  output   O, the norm and the gate                                   (chunk, head) in parallel

Nothing is read back to the host: the number of chunks is bounded by rows / 64 + sequences, and programs beyond
the last chunk return at once. `slots` may begin anywhere among a batch's, so no kernel is compiled anew for where it
does. A long call is cut into parts, one after another, so that the
workspace stays small; a part goes on from the states that the one before left in the slots.
"""

import math

import torch
import triton
import triton.language as tl

from kda_kernels.cuda.intra import intra_kernel
from kda_kernels.cuda.output import output_kernel
from kda_kernels.cuda.prepare import prepare_kernel
from kda_kernels.cuda.rows import cut
from kda_kernels.cuda.states import combine_kernel, states_kernel
from kda_kernels.interface import PrefillArgs

CHUNK = 64
COLUMNS = 32
PREPARE = {"GROUP": 4, "num_warps": 1}
INTRA = {"COLUMNS": 64, "num_warps": 4, "num_stages": 1}
STATES = {"num_warps": 4, "num_stages": 3}
OUTPUT = {"num_warps": 4}
COMBINE = {"num_warps": 8}
PROGRAMS = 132  # a program of `states` for each multiprocessor of a Hopper GPU
PART = 1 << 19  # rows x heads of one part: 0.9 GB of workspace for head size 128


def prefill(args: PrefillArgs) -> None:
    """Runs of tokens of N sequences. No host synchronisation. The values of the tables are not checked."""
    if args.state_indices.shape[0] == 0:
        return
    num_tokens = args.inputs.qkv.shape[0]
    part = max(PART // args.params.heads // CHUNK, 1) * CHUNK
    for begin in range(0, max(num_tokens, 1), part):
        _part(args, begin, min(begin + part, num_tokens))


def _part(args: PrefillArgs, begin: int, end: int) -> None:
    inputs, params, state, out, checkpoints = args.inputs, args.params, args.state, args.out, args.checkpoints
    cu_seqlens, state_indices, has_initial_state = args.cu_seqlens, args.state_indices, args.has_initial_state
    heads, dim, conv_kernel_size = params.heads, params.head_dim, params.conv_kernel_size
    sequences, device = state_indices.shape[0], inputs.qkv.device
    # A part begins and ends between whole chunks of a sequence: up to CHUNK - 1 rows before `begin` and `end`.
    chunks = (end - begin) // CHUNK + min(sequences, end - begin) + (begin > 0)
    columns = min(dim, COLUMNS)
    operand = torch.float32 if inputs.qkv.dtype == torch.float32 else torch.float16
    first_chunk = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    chunk_sequence = torch.empty(chunks, dtype=torch.int32, device=device)
    tiles = (chunks, heads, CHUNK, dim)
    w, u, qd, kd = (torch.empty(tiles, dtype=operand, device=device) for _ in range(4))
    p = torch.empty(chunks, heads, CHUNK, CHUNK, dtype=operand, device=device)
    snapshots = torch.empty(chunks, heads, dim, dim, dtype=operand, device=device)
    sums = snapshots.view(torch.float32)  # of g; `states`, which writes snapshots, has no use for them
    if sums.shape[2] * sums.shape[3] < CHUNK * dim:
        sums = torch.empty(tiles, dtype=torch.float32, device=device)
    strengths, v_scales = torch.empty(2, chunks, heads, CHUNK, dtype=torch.float32, device=device)
    decay = torch.empty(chunks, heads, dim, dtype=torch.float32, device=device)
    scale = torch.empty(heads, chunks, dtype=torch.float32, device=device)
    length = _segment_length(chunks, heads * (dim // columns) * sequences)
    segments = chunks // length + sequences if length else sequences
    units = torch.empty(segments, heads, dim // columns, dtype=torch.float32, device=device)
    qkv_stride, conv = inputs.qkv.stride(0), (state.conv.stride(0), state.conv.stride(1))

    table_kernel[(sequences,)](cu_seqlens, first_chunk, chunk_sequence, begin, end, sequences, chunks, 1, 0, C=CHUNK)
    if chunks:
        prepare_kernel[(chunks * 4, heads)](
            *(inputs.qkv, inputs.g, inputs.beta, params.conv_weight, params.A_log, params.dt_bias),
            *(state.conv, state_indices, has_initial_state, cu_seqlens, chunk_sequence, first_chunk),
            *(qd, kd, u, sums, strengths, v_scales, begin, end),
            *(qkv_stride, inputs.g.stride(0), inputs.beta.stride(0), *conv, heads),
            D=dim,
            C=CHUNK,
            TAPS=conv_kernel_size,
            QKV_ALIGN=math.gcd(qkv_stride, 16),
            FORGET_ALIGN=math.gcd(inputs.g.stride(0), 16),
            **PREPARE,
        )
        intra_kernel[(chunks, heads)](
            *(state_indices, chunk_sequence, w, u, qd, kd, p, decay, scale, sums, strengths, v_scales, heads, chunks),
            D=dim,
            C=CHUNK,
            LEVELS=CHUNK.bit_length() - 1,
            **INTRA,
        )
    first_segment, segment_sequence, starts, transitions = first_chunk, chunk_sequence, units, units
    if length:
        first_segment, segment_sequence = torch.empty_like(first_chunk), first_chunk.new_empty(segments)
        starts, transitions = (torch.empty(segments, heads, dim, dim, device=device) for _ in range(2))
        table_kernel[(sequences,)](
            cu_seqlens, first_segment, segment_sequence, begin, end, sequences, segments, length, 1, C=CHUNK
        )

    checkpoint_offsets, checkpoint_state_indices, num_checkpoints = state_indices, state_indices, 0
    if checkpoints is not None:
        checkpoint_offsets, checkpoint_state_indices = checkpoints.checkpoint_offsets, checkpoints.state_indices
        num_checkpoints = checkpoint_offsets.shape[0]

    def states(parts: int, summary: bool) -> None:
        states_kernel[(parts, heads, segments)](
            *(inputs.qkv, state.conv, state.recurrent, state_indices, has_initial_state, cu_seqlens, first_chunk),
            *(segment_sequence, first_segment, w, u, kd, decay, scale, snapshots, units, starts, transitions),
            *(checkpoint_offsets, checkpoint_state_indices, num_checkpoints),
            *(begin, end, length, qkv_stride, *conv, state.recurrent.stride(0), heads, chunks),
            D=dim,
            C=CHUNK,
            BV=columns,
            TAPS=conv_kernel_size,
            WINDOW=triton.next_power_of_2(conv_kernel_size - 1),
            SEGMENTS=length > 0,
            SUMMARY=summary,
            EXPORTS=checkpoints is not None and not summary,
            **STATES,
        )

    if length:
        states(2 * dim // columns, True)
        combine_kernel[(dim // columns, heads, sequences)](
            state_indices, first_segment, starts, transitions, heads, D=dim, BV=columns, **COMBINE
        )
    states(dim // columns, False)
    if chunks:
        output_kernel[(chunks, heads)](
            *(inputs.output_gate, params.norm_weight, state_indices),
            *(
                cu_seqlens,
                chunk_sequence,
                first_chunk,
                first_segment,
                qd,
                p,
                u,
                snapshots,
                units,
                out,
                begin,
                end,
                length,
            ),
            *(inputs.output_gate.stride(0), out.stride(0), params.norm_eps, heads),
            D=dim,
            C=CHUNK,
            BV=columns,
            SEGMENTS=length > 0,
            **OUTPUT,
        )


def _segment_length(chunks: int, programs: int) -> int:
    """Chunks of a segment, or 0 for whole sequences: split where `programs` leave most of the GPU idle.

    Summing a segment up costs twice its pass, so a split pays from about four segments.
    """
    segments = 2 * PROGRAMS // max(programs, 1)
    return max(-(-chunks // segments), 4) if segments >= 4 and chunks >= 32 else 0


@triton.jit(do_not_specialize=["begin", "end", "sequences", "chunks", "length", "least"])
def table_kernel(
    cu_seqlens, first_chunk, chunk_sequence, begin, end, sequences, chunks, length, least, C: tl.constexpr
):
    """first_chunk[n], chunk_sequence[first_chunk[n] ..] for the rows from begin to end; -1 beyond the last.

    A chunk here has `length` times C rows; a sequence without rows there has `least` chunks.
    """
    n = tl.program_id(0)
    before = 0
    here = 0
    for block in range(0, n + 1, 256):
        m = block + tl.arange(0, 256)
        start = tl.load(cu_seqlens + m, mask=m <= n, other=0)
        stop = tl.load(cu_seqlens + m + 1, mask=m <= n, other=0)
        rows = cut(end, start, stop, C) - cut(begin, start, stop, C)
        count = tl.where(m <= n, tl.maximum((rows + C * length - 1) // (C * length), least), 0)
        before += tl.sum(tl.where(m < n, count, 0), 0)
        here += tl.sum(tl.where(m == n, count, 0), 0)
    tl.store(first_chunk + n, before)
    for block in range(0, here, 256):
        m = block + tl.arange(0, 256)
        tl.store(chunk_sequence + before + m, tl.zeros([256], tl.int32) + n, mask=m < here)
    if n == sequences - 1:
        tl.store(first_chunk + sequences, before + here)
        for block in range(before + here, chunks, 256):
            m = block + tl.arange(0, 256)
            tl.store(chunk_sequence + m, tl.full([256], -1, tl.int32), mask=m < chunks)
