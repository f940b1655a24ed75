"""What a graph reads anew in a step in which every sequence of the step before takes one token more."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _next_inputs_kernel(
    idx_mapping, num_computed_tokens, last_sampled_tokens, input_ids, positions, seq_lens, block_table, slot_mapping,
    block_table_stride, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One sequence a program."""
    row = tl.program_id(0)
    request = tl.load(idx_mapping + row)
    computed = tl.load(num_computed_tokens + request)
    block = tl.load(block_table + request * block_table_stride + computed // BLOCK_SIZE).to(tl.int64)
    tl.store(input_ids + row, tl.load(last_sampled_tokens + request))
    tl.store(positions + row, computed)
    tl.store(seq_lens + row, computed + 1)
    tl.store(slot_mapping + row, block * BLOCK_SIZE + computed % BLOCK_SIZE)


def write(
    idx_mapping: Tensor,
    num_computed_tokens: Tensor,
    last_sampled_tokens: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
) -> None:
    """Each sequence's last token, its position, the length with it, and the slot of its latent, in one launch.

    idx_mapping [B] int64 says which row is whose of num_computed_tokens [requests] int32, last_sampled_tokens
    [requests, 1] int64 and block_table [requests, blocks] int32. Written are the first B of input_ids, seq_lens int32,
    positions and slot_mapping int64; what pads the graph stays.
    """
    _next_inputs_kernel[(len(idx_mapping),)](
        idx_mapping,
        num_computed_tokens,
        last_sampled_tokens,
        input_ids,
        positions,
        seq_lens,
        block_table,
        slot_mapping,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        num_warps=1,
    )


def warm_up(block_table: Tensor, block_size: int) -> None:
    """Run it once on tensors of nobody, so that no request waits for the compiler."""
    fours = [torch.zeros(1, dtype=torch.int32, device=block_table.device) for _ in range(3)]
    eights = [torch.zeros(1, dtype=torch.int64, device=block_table.device) for _ in range(4)]
    write(eights[0], fours[0], eights[1], fours[1], eights[2], fours[2], block_table, eights[3], block_size)
