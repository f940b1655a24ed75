"""What vLLM does to the states of drafted tokens at block boundaries, without a GPU's kernels.

A verified draft leaves the state after each of its tokens in a column of the block table of its own, one behind the
other. When the accepted tokens reach the end of a block, the state there has to stand in that block's column, where
the prefix cache finds it; and when a request enters a block, its running state moves there.

These two functions take the places of methods of `MambaSpecDecodeGPUContext`, and their arguments
(`patches/cpu_draft_states.py`).
"""

import ctypes
from typing import Any

import torch


def keep_at_block_ends(
    context: Any,
    num_reqs: int,
    num_accepted_tokens_gpu: torch.Tensor,
    mamba_state_idx_gpu: torch.Tensor,
    num_scheduled_tokens_gpu: torch.Tensor,
    num_computed_tokens_gpu: torch.Tensor,
    num_draft_tokens_gpu: torch.Tensor,
) -> None:
    """After a step: put the state at the last block end that was passed into that block's column.

    All arguments are int32 [requests] or longer. Where that column is the running one, its first state now holds all
    accepted tokens, and `context.num_accepted_tokens_out` becomes 1.
    """
    if not context.is_initialized:
        return
    context.num_accepted_tokens_out[:num_reqs].copy_(num_accepted_tokens_gpu[:num_reqs])
    columns = (
        num_accepted_tokens_gpu,
        mamba_state_idx_gpu,
        num_scheduled_tokens_gpu,
        num_computed_tokens_gpu,
        num_draft_tokens_gpu,
    )
    requests = zip(*(column[:num_reqs].tolist() for column in columns), strict=True)
    for request, (accepted, running, scheduled, computed, drafted) in enumerate(requests):
        first = computed + scheduled - drafted  # tokens that the first state of the running column holds
        end = (first + accepted - 1) // context.block_size * context.block_size
        if end < first:
            continue
        column = end // context.block_size - 1
        if column == running:
            context.num_accepted_tokens_out[request] = 1
        _copy(context, request, running + end - first, column)


def move_to_new_block(
    context: Any,
    num_reqs: int,
    state_idx_gpu: torch.Tensor,
    src_col_gpu: torch.Tensor,
    token_bias_gpu: torch.Tensor,
    idx_mapping: torch.Tensor | None,
) -> None:
    """Before a step: copy the last accepted state of each request that enters a block to its new running column."""
    assert idx_mapping is None  # requests stand in the order of the batch
    if not context.is_initialized:
        return
    columns = (state_idx_gpu, src_col_gpu, token_bias_gpu)
    requests = zip(*(column[:num_reqs].tolist() for column in columns), strict=True)
    for request, (running, source, bias) in enumerate(requests):
        if source >= 0 and source != running:
            _copy(context, request, source + bias, running)


def _copy(context: Any, request: int, source: int, target: int) -> None:
    """Copy both states of every layer from one column of a request to another."""
    if source == target:
        return
    tables = context.block_table_ptrs.tolist()
    row = request * int(context.block_table_stride_req)
    states = zip(
        context.state_base_addrs.tolist(),
        context.state_block_strides.tolist(),
        (context.state_inner_sizes * context.state_elem_sizes).tolist(),
        context.state_group_indices.tolist(),
        strict=True,
    )
    for base, stride, size, group in list(states)[: context.num_states]:
        block = [ctypes.c_int32.from_address(tables[group] + (row + column) * 4).value for column in (source, target)]
        ctypes.memmove(base + block[1] * stride, base + block[0] * stride, size)
