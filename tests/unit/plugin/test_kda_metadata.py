"""Which tokens of a step are decode, spec decode and prefill, and with which states."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_kimi_linear.attention import kda_metadata
from vllm_kimi_linear.attention.kda_metadata import KdaMetadata, KdaMetadataBuilder
from vllm_kimi_linear.cache.policy import StateCheckpoints

MOST = 8


def builder(draft_tokens: int = 0, block: int = 0, **additional: bool) -> KdaMetadataBuilder:
    speculative = SimpleNamespace(num_speculative_tokens=draft_tokens, parallel_drafting=False)
    config: Any = SimpleNamespace(
        num_speculative_tokens=draft_tokens,
        speculative_config=speculative if draft_tokens else None,
        scheduler_config=SimpleNamespace(max_num_seqs=MOST),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        additional_config=additional,
        cache_config=SimpleNamespace(mamba_cache_mode="align" if block else "none"),
    )
    spec: Any = MambaSpec(block_size=block or 1, shapes=(), dtypes=(), num_speculative_blocks=draft_tokens)
    return KdaMetadataBuilder(spec, [], config, torch.device("cpu"))


def step(lengths: list[int], contexts: list[int], columns: int = 1) -> CommonAttentionMetadata:
    """Request i has lengths[i] rows after contexts[i] tokens, and the blocks 10 (i + 1), 10 (i + 1) + 1, ..."""
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([a + b for a, b in zip(lengths, contexts, strict=True)], dtype=torch.int32)
    first = torch.arange(1, len(lengths) + 1, dtype=torch.int32)[:, None] * 10
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        max_seq_len=int(seq_lens.max()),
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        block_table_tensor=first + torch.arange(columns, dtype=torch.int32),
        slot_mapping=torch.zeros(0),
    )


def prefills(metadata: KdaMetadata) -> tuple[list[int], list[int], list[bool]]:
    assert metadata.prefill is not None
    rows = metadata.prefill
    return metadata.prefill_state_indices.tolist(), rows.cu_seqlens.tolist(), rows.has_initial_state.tolist()


def test_decodes_alone():
    metadata = builder().build(0, step([1, 1, 1], [5, 6, 7]))
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (3, 3)
    assert metadata.decode_state_indices[:, 0].tolist() == [10, 20, 30]
    assert metadata.prefill is metadata.spec_decode is metadata.reordering is None


def test_decodes_and_prefills():
    metadata = builder().build(0, step([1, 1, 5, 64], [5, 6, 0, 128]))
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_tokens) == (2, 2, 71)
    assert metadata.decode_state_indices[:, 0].tolist() == [10, 20]
    assert prefills(metadata) == ([30, 40], [0, 5, 69], [False, True])
    assert metadata.reordering is None


def test_prompts_of_one_token_start_from_zero():
    metadata = builder().build(0, step([1, 1], [0, 0]))
    assert metadata.num_decodes == 0
    assert prefills(metadata) == ([10, 20], [0, 1, 2], [False, False])


def test_requests_out_of_order_are_sorted():
    metadata = builder().build(0, step([1, 2, 1, 1], [0, 0, 9, 4]))
    assert metadata.reordering is not None
    assert metadata.reordering.requests.tolist() == [2, 3, 0, 1]
    assert metadata.reordering.tokens.tolist() == [3, 4, 0, 1, 2]
    assert metadata.decode_state_indices[:, 0].tolist() == [30, 40]
    assert prefills(metadata) == ([10, 20], [0, 1, 3], [False, False])


def test_padding_of_a_graph_has_null_slots():
    kda = builder()
    kda.build(0, step([1, 1, 1, 1], [5, 6, 7, 8]))  # leaves its state indices behind
    metadata = kda.build(0, step([1, 1, 0, 0], [5, 6, 0, 0]))
    assert metadata.num_decodes == 4
    assert metadata.decode_state_indices[:, 0].tolist() == [10, 20, 0, 0]


def test_a_captured_graph_reads_where_later_steps_write():
    kda = builder()
    captured = kda.build_for_cudagraph_capture(step([1] * 4, [0] * 4))
    assert (captured.num_decodes, captured.num_decode_tokens) == (4, 4)
    kda.build(0, step([1, 1, 0, 0], [5, 6, 0, 0]))
    assert captured.decode_state_indices[:, 0].tolist() == [10, 20, 0, 0]


def test_drafts_are_verified():
    kda = builder(draft_tokens=2)
    accepted = torch.tensor([1, 3, 2], dtype=torch.int32)
    metadata = kda.build(0, step([3, 2, 1], [5, 6, 7], 3), accepted, torch.tensor([2, 1, 0]))
    assert metadata.spec_decode is not None
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (3, 6)
    assert metadata.decode_state_indices.tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert metadata.spec_decode.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert metadata.spec_decode.num_accepted_tokens.tolist() == [1, 3, 2]


def test_drafts_among_prefills_are_sorted():
    kda = builder(draft_tokens=2)
    accepted = torch.tensor([3, 1, 2], dtype=torch.int32)
    metadata = kda.build(0, step([3, 3, 1], [5, 0, 7], 3), accepted, torch.tensor([2, -1, 0]))
    assert metadata.spec_decode is not None and metadata.reordering is not None
    assert metadata.reordering.tokens.tolist() == [0, 1, 2, 6, 3, 4, 5]
    assert metadata.spec_decode.cu_seqlens.tolist() == [0, 3, 4]
    assert metadata.spec_decode.num_accepted_tokens.tolist() == [3, 2]
    assert metadata.decode_state_indices.tolist() == [[10, 11, 12], [30, 31, 32]]
    assert prefills(metadata) == ([20], [0, 3], [False])


def test_another_group_differs_in_its_slots_alone():
    kda, other = builder(), builder()
    metadata = kda.build(0, step([1, 1, 4], [5, 6, 0]))
    moved = other.update_block_table(metadata, step([1, 1, 4], [5, 6, 0]).block_table_tensor + 5, torch.zeros(0))
    assert metadata.decode_state_indices[:, 0].tolist() == [10, 20]
    assert moved.decode_state_indices[:, 0].tolist() == [15, 25]
    assert moved.prefill_state_indices.tolist() == [35]
    assert moved.prefill is metadata.prefill


def test_slots_that_the_runner_found_for_all_groups_are_taken_as_they_lie():
    """CUDA graphs replay with their addresses; requests of no rows pad a graph."""
    kda = builder(block=16)
    kda.mamba_aligned_state_indices = torch.tensor([[7], [8], [9], [0]], dtype=torch.int32)
    decodes = kda.build(0, step([1, 1, 1, 0], [5, 6, 7, 0]))
    assert (decodes.num_requests, decodes.num_decodes) == (3, 4)
    assert decodes.decode_state_indices.tolist() == [[7], [8], [9], [0]]
    assert decodes.decode_state_indices.data_ptr() == kda.mamba_aligned_state_indices.data_ptr()
    mixed = kda.build(0, step([1, 1, 4], [5, 6, 0]))
    assert mixed.decode_state_indices[:, 0].tolist() == [7, 8]
    assert mixed.prefill_state_indices.tolist() == [9]
    swapped = kda.build(0, step([4, 1, 1], [0, 5, 6]))
    assert swapped.decode_state_indices[:, 0].tolist() == [8, 9]
    assert swapped.prefill_state_indices.tolist() == [7]


def test_states_are_kept_where_the_scheduler_says():
    """Blocks of 16; the middle one of three requests keeps two states in its 46 tokens, each group in its own block."""
    common = step([16, 46, 8], [0, 16, 4], columns=4)
    kept = StateCheckpoints(positions=(32, 48), blocks={3: (70, 71), 5: (80, 81)})
    kda, other = builder(block=16), builder(block=16)
    kda.keep_states(3, [None, kept, None])
    other.keep_states(5, [None, kept, None])
    other.mamba_aligned_state_indices = torch.tensor([[17], [18], [19]], dtype=torch.int32)
    metadata = kda.build(0, common)
    assert metadata.prefill_checkpoints is not None
    assert metadata.prefill_checkpoints.checkpoint_offsets.tolist() == [16 + 16, 16 + 32]
    assert metadata.prefill_checkpoints.state_indices.tolist() == [70, 71]
    moved = other.update_block_table(metadata, common.block_table_tensor, torch.zeros(0))
    assert moved.prefill_checkpoints is not None
    assert moved.prefill_checkpoints.state_indices.tolist() == [80, 81]
    assert kda.build(0, common).prefill_checkpoints is None  # what was said holds for one step


def test_columns_that_name_a_block_are_no_states_to_keep():
    """As a block table has them that held drafts before a chunk."""
    assert builder(draft_tokens=2, block=16).build(0, step([64], [16], columns=8)).prefill_checkpoints is None


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_the_check_of_states_says_that_drafts_leave_it_nothing(draft_tokens: int):
    with mock.patch.object(kda_metadata, "logger") as logger:
        found = builder(draft_tokens, check_states=True).check
    assert (found is None) == bool(draft_tokens) == logger.warning_once.called


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_full_graphs_take_decodes_of_one_length(draft_tokens: int):
    kda = builder(draft_tokens)
    assert kda.reorder_batch_threshold == 1 + draft_tokens
    assert kda.get_cudagraph_support(kda.vllm_config, kda.kv_cache_spec).name == "UNIFORM_BATCH"
