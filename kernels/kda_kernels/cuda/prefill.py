"""Prefill: runs of tokens of many sequences, in passes over chunks of 64 tokens.

  index          which sequence each chunk belongs to                    one small program a sequence
  conv_gate      convolution, normalisation, gate                        (q, k, v or g of a chunk, head) in parallel
  chunk_intra    what a chunk can know without the state                 (chunk, head) in parallel
  chunk_delta_h  the state h from chunk to chunk, and the new states     (value columns, head, sequence)
  chunk_o        o, the norm and the output gate                         (chunk, head) in parallel

Nothing is read back to the host: the number of chunks is bounded by tokens / 64 + sequences, and programs beyond the
last chunk return at once. `state_indices` may begin anywhere among a batch's, so no kernel is compiled anew for where
it does. A long call is cut into parts, one after another, so that the workspace stays small; a part starts from the
states that the one before left in the cache.

| workspace     | dtype, shape             | meaning                                                          |
| ------------- | ------------------------ | ---------------------------------------------------------------- |
| chunk_offsets | int32 [N+1]              | the first chunk of each sequence                                 |
| chunk_seq_idx | int32 [chunks]           | the sequence of each chunk, -1 beyond the last                   |
| w, u, qg, kg  | operand [chunks, H, BT, D] | as FLA's: what `chunk_intra` leaves; before it q, k, v lie there |
| Aqk           | operand [chunks, H, BT, BT] | q k^T with decays, lower triangular                           |
| h             | operand [chunks, H, K, V] | the state before each chunk, times h_scale                      |
| g_cumsum      | fp32 [chunks, H, BT, K]  | in the memory of h                                               |
| decay         | fp32 [chunks, H, K]      | of a whole chunk                                                 |
| segment_*     |                          | as chunk_*, for segments of `length` chunks                      |

Operands are fp16, or fp32 where the inputs are.
"""

import math

import torch
import triton

from kda_kernels.constants import CHUNK_SIZE, NUM_SMS, SEGMENTED_TOKENS
from kda_kernels.cuda.chunk_delta_h import kda_chunk_delta_h_kernel, kda_combine_segments_kernel
from kda_kernels.cuda.chunk_intra import kda_chunk_intra_kernel
from kda_kernels.cuda.chunk_o import kda_chunk_o_kernel
from kda_kernels.cuda.conv_gate import kda_conv_gate_kernel
from kda_kernels.cuda.index import kda_chunk_index_kernel
from kda_kernels.interface import PrefillArgs

BV = 32
CONV_GATE = {"GROUP": 4, "num_warps": 1}
CHUNK_INTRA = {"BK": 64, "num_warps": 4, "num_stages": 1}
CHUNK_DELTA_H = {"num_warps": 4, "num_stages": 3}
CHUNK_O = {"num_warps": 4}
COMBINE_SEGMENTS = {"num_warps": 8}
PART = 1 << 19  # tokens x heads of one part: 0.9 GB of workspace for head size 128


def prefill(args: PrefillArgs) -> None:
    """Runs of tokens of N sequences. No host synchronisation. The values of the tables are not checked."""
    if args.state_indices.shape[0] == 0:
        return
    num_tokens = args.inputs.qkv.shape[0]
    part = max(PART // args.params.heads // CHUNK_SIZE, 1) * CHUNK_SIZE
    for begin in range(0, max(num_tokens, 1), part):
        _part(args, begin, min(begin + part, num_tokens))


def _part(args: PrefillArgs, begin: int, end: int) -> None:
    inputs, params, state, out, checkpoints = args.inputs, args.params, args.state, args.out, args.checkpoints
    cu_seqlens, state_indices, has_initial_state = args.cu_seqlens, args.state_indices, args.has_initial_state
    heads, dim, conv_kernel_size = params.heads, params.head_dim, params.conv_kernel_size
    sequences, device = state_indices.shape[0], inputs.qkv.device
    # A part begins and ends between whole chunks of a sequence: up to CHUNK_SIZE - 1 tokens before `begin` and `end`.
    chunks = (end - begin) // CHUNK_SIZE + min(sequences, end - begin) + (begin > 0)
    bv = min(dim, BV)
    operand = torch.float32 if inputs.qkv.dtype == torch.float32 else torch.float16
    chunk_offsets = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    chunk_seq_idx = torch.empty(chunks, dtype=torch.int32, device=device)
    tiles = (chunks, heads, CHUNK_SIZE, dim)
    w, u, qg, kg = (torch.empty(tiles, dtype=operand, device=device) for _ in range(4))
    Aqk = torch.empty(chunks, heads, CHUNK_SIZE, CHUNK_SIZE, dtype=operand, device=device)
    h = torch.empty(chunks, heads, dim, dim, dtype=operand, device=device)
    g_cumsum = h.view(torch.float32)  # `chunk_delta_h`, which writes h, has no use for it
    if g_cumsum.shape[2] * g_cumsum.shape[3] < CHUNK_SIZE * dim:
        g_cumsum = torch.empty(tiles, dtype=torch.float32, device=device)
    beta, v_scales = torch.empty(2, chunks, heads, CHUNK_SIZE, dtype=torch.float32, device=device)
    decay = torch.empty(chunks, heads, dim, dtype=torch.float32, device=device)
    u_scale = torch.empty(heads, chunks, dtype=torch.float32, device=device)
    length = _segment_length(chunks, heads * (dim // bv) * sequences)
    segments = chunks // length + sequences if length else sequences
    h_scale = torch.empty(segments, heads, dim // bv, dtype=torch.float32, device=device)
    qkv_stride, conv = inputs.qkv.stride(0), (state.conv.stride(0), state.conv.stride(1))

    kda_chunk_index_kernel[(sequences,)](
        cu_seqlens, chunk_offsets, chunk_seq_idx, begin, end, sequences, chunks, 1, 0, BT=CHUNK_SIZE
    )
    if chunks:
        kda_conv_gate_kernel[(chunks * 4, heads)](
            *(inputs.qkv, inputs.g, inputs.beta, params.conv_weight, params.A_log, params.dt_bias),
            *(state.conv, state_indices, has_initial_state, cu_seqlens, chunk_seq_idx, chunk_offsets),
            *(qg, kg, u, g_cumsum, beta, v_scales, begin, end),
            *(qkv_stride, inputs.g.stride(0), inputs.beta.stride(0), *conv, heads),
            D=dim,
            BT=CHUNK_SIZE,
            W=conv_kernel_size,
            QKV_ALIGN=math.gcd(qkv_stride, 16),
            G_ALIGN=math.gcd(inputs.g.stride(0), 16),
            **CONV_GATE,
        )
        kda_chunk_intra_kernel[(chunks, heads)](
            *(state_indices, chunk_seq_idx, w, u, qg, kg, Aqk, decay, u_scale, g_cumsum, beta, v_scales, heads, chunks),
            D=dim,
            BT=CHUNK_SIZE,
            LEVELS=CHUNK_SIZE.bit_length() - 1,
            **CHUNK_INTRA,
        )
    segment_offsets, segment_seq_idx, initial_states, transitions = chunk_offsets, chunk_seq_idx, h_scale, h_scale
    if length:
        segment_offsets, segment_seq_idx = torch.empty_like(chunk_offsets), chunk_offsets.new_empty(segments)
        initial_states, transitions = (torch.empty(segments, heads, dim, dim, device=device) for _ in range(2))
        kda_chunk_index_kernel[(sequences,)](
            cu_seqlens, segment_offsets, segment_seq_idx, begin, end, sequences, segments, length, 1, BT=CHUNK_SIZE
        )

    checkpoint_offsets, checkpoint_state_indices, num_checkpoints = state_indices, state_indices, 0
    if checkpoints is not None:
        checkpoint_offsets, checkpoint_state_indices = checkpoints.checkpoint_offsets, checkpoints.state_indices
        num_checkpoints = checkpoint_offsets.shape[0]

    def chunk_delta_h(parts: int, summary: bool) -> None:
        kda_chunk_delta_h_kernel[(parts, heads, segments)](
            *(inputs.qkv, state.conv, state.recurrent, state_indices, has_initial_state, cu_seqlens, chunk_offsets),
            *(segment_seq_idx, segment_offsets, w, u, kg, decay, u_scale, h, h_scale, initial_states, transitions),
            *(checkpoint_offsets, checkpoint_state_indices, num_checkpoints),
            *(begin, end, length, qkv_stride, *conv, state.recurrent.stride(0), heads, chunks),
            D=dim,
            BT=CHUNK_SIZE,
            BV=bv,
            W=conv_kernel_size,
            BW=triton.next_power_of_2(conv_kernel_size - 1),
            SEGMENTS=length > 0,
            SUMMARY=summary,
            STORE_CHECKPOINTS=checkpoints is not None and not summary,
            **CHUNK_DELTA_H,
        )

    if length:
        chunk_delta_h(2 * dim // bv, True)
        kda_combine_segments_kernel[(dim // bv, heads, sequences)](
            state_indices, segment_offsets, initial_states, transitions, heads, D=dim, BV=bv, **COMBINE_SEGMENTS
        )
    chunk_delta_h(dim // bv, False)
    if chunks:
        kda_chunk_o_kernel[(chunks, heads)](
            *(inputs.output_gate, params.norm_weight, state_indices),
            *(cu_seqlens, chunk_seq_idx, chunk_offsets, segment_offsets, qg, Aqk, u, h, h_scale, out),
            *(begin, end, length),
            *(inputs.output_gate.stride(0), out.stride(0), params.norm_eps, heads),
            D=dim,
            BT=CHUNK_SIZE,
            BV=bv,
            SEGMENTS=length > 0,
            **CHUNK_O,
        )


def _segment_length(chunks: int, programs: int) -> int:
    """Chunks of a segment, or 0 for whole sequences: split where `programs` of
    `chunk_delta_h`, one for each multiprocessor at a time, leave most of the GPU idle.

    Summing a segment up costs twice its pass, so a split pays from about four segments.
    """
    segments = 2 * NUM_SMS // max(programs, 1)
    return max(-(-chunks // segments), 4) if segments >= 4 and chunks >= SEGMENTED_TOKENS // CHUNK_SIZE else 0
