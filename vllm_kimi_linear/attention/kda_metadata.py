"""Per-batch metadata of the KDA layers: which tokens are decode, which prefill, and which state is whose.

vLLM hands every step to us as tokens, requests one after another, as a rule those that only decode first. The
split is made here, once a step; the layers only slice.

A CUDA graph of a decode step replays with the addresses it was captured with: what such a step reads lies in
buffers of the builder, filled up with null states to the size of the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kda_kernels.interface import PrefillCheckpoints
from vllm_kimi_linear.cache.check import StateCheck
from vllm_kimi_linear.cache.policy import StateCheckpoints
from vllm_kimi_linear.log import logger


def context_lens_of(common: CommonAttentionMetadata) -> torch.Tensor:
    """[num_requests] int32, host: tokens computed before this step; with drafts in flight perhaps too many."""
    seq_lens = common.seq_lens_cpu_upper_bound
    if seq_lens is None:
        seq_lens = common.seq_lens.cpu()
    return seq_lens[: common.num_reqs] - common.query_start_loc_cpu.diff()


@dataclass(frozen=True)
class SpecDecode:
    """The requests that decode, with drafted tokens to be checked: up to K tokens each."""

    cu_seqlens: torch.Tensor  # [decodes + 1] int32
    num_accepted_tokens: torch.Tensor  # [decodes] int32: how many tokens of the last step stand, one or more


@dataclass(frozen=True)
class Prefill:
    cu_seqlens: torch.Tensor  # [prefills + 1] int32, counted from the first prefill token
    has_initial_state: torch.Tensor  # [prefills] bool: go on from the state at the index, else start from zero
    checkpoints: tuple[StateCheckpoints, ...]  # of those requests that keep states, in the order of the batch
    checkpoint_offsets: torch.Tensor  # [all their positions] int32: prefill tokens before each


@dataclass(frozen=True)
class Reordering:
    """The batch's requests and tokens, decode first, where vLLM has mixed them."""

    requests: torch.Tensor  # [num_requests] int64
    tokens: torch.Tensor  # [num_tokens] int64


@dataclass(frozen=True)
class KdaMetadata:
    """One step as a KDA layer sees it: first the requests that decode, then the prefills.

    A request that decodes has one token and one state; with --speculative-config up to K tokens, and K states.
    """

    num_requests: int
    num_tokens: int
    num_decodes: int  # requests; with those that pad a CUDA graph, if there is no prefill
    num_decode_tokens: int
    decode_state_indices: torch.Tensor  # [decodes, K] int32
    prefill_state_indices: torch.Tensor  # [prefills] int32
    prefill_checkpoints: PrefillCheckpoints | None  # states to be kept at block boundaries
    spec_decode: SpecDecode | None
    prefill: Prefill | None
    reordering: Reordering | None


class KdaMetadataBuilder(GDNAttentionMetadataBuilder):
    """A subclass of the in-tree builder for one reason: vLLM tells accepted drafts to builders it knows by class."""

    kv_cache_spec: MambaSpec

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.draft_tokens = vllm_config.num_speculative_tokens
        self.group = 0
        self.checkpoints: Sequence[StateCheckpoints | None] = ()
        self.check: StateCheck | None = None
        if vllm_config.additional_config.get("check_states") and self.draft_tokens:
            logger.warning_once("check_states checks nothing with drafts")
        elif vllm_config.additional_config.get("check_states"):
            aligned = vllm_config.cache_config.mamba_cache_mode == "align"
            self.check = StateCheck(kv_cache_spec.block_size if aligned else 0, layer_names)
        requests = vllm_config.scheduler_config.max_num_seqs
        self.state_indices = torch.zeros(requests, 1 + self.draft_tokens, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.num_accepted_tokens = torch.ones(requests, dtype=torch.int32, device=device)
        # One group's metadata serves the other groups but for its state indices, where the runner's graphs allow it.
        self.supports_update_block_table = device.type == "cuda" and vllm_config.use_v2_model_runner
        if self.supports_update_block_table:
            # The runner looks for this name, and then finds the state indices of all groups in one launch.
            self.mamba_aligned_state_indices: torch.Tensor | None = None

    def keep_states(self, group: int, checkpoints: Sequence[StateCheckpoints | None]) -> None:
        """The states that the next step keeps, of each request in the order of the batch, in blocks of this group."""
        self.group, self.checkpoints = group, checkpoints

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_BATCH

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> KdaMetadata:
        """A step of decodes alone; vLLM makes the lengths of their sequences up."""
        return self._build(common_attn_metadata, [True] * common_attn_metadata.num_reqs, None)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        num_accepted_tokens: torch.Tensor | None = None,
        num_decode_draft_tokens_cpu: torch.Tensor | None = None,
        fast_build: bool = False,
    ) -> KdaMetadata:
        """num_accepted_tokens: [requests] int32; num_decode_draft_tokens_cpu: [requests], -1 for a prefill."""
        lengths = common_attn_metadata.query_start_loc_cpu.diff()
        decodes = (lengths == 1) & (context_lens_of(common_attn_metadata) > 0)
        if num_decode_draft_tokens_cpu is not None:
            decodes |= num_decode_draft_tokens_cpu >= 0
        return self._build(common_attn_metadata, decodes.tolist(), num_accepted_tokens)

    def update_block_table(
        self, metadata: KdaMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> KdaMetadata:
        """The metadata of another group of KDA layers, which differs in its state indices alone."""
        self.checkpoints = ()
        return self._with_state_indices(metadata, self._state_indices(blk_table, None))

    def _build(
        self, common: CommonAttentionMetadata, decodes: list[bool], num_accepted_tokens: torch.Tensor | None
    ) -> KdaMetadata:
        starts = common.query_start_loc_cpu.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        requests = sum(length > 0 for length in lengths)  # empty ones, at the end, pad a graph
        checkpoints, self.checkpoints = self.checkpoints, ()
        if self.check:
            kept = [
                tuple(zip(found.positions, found.blocks[self.group], strict=True)) if found else ()
                for found in checkpoints
            ]
            table, contexts = common.block_table_tensor.tolist(), context_lens_of(common).tolist()
            self.check.step(table, contexts, lengths[:requests], kept)
        ranked = sorted(range(requests), key=lambda request: not decodes[request])
        count = sum(decodes[:requests])
        reordering, prefills = None, None
        if ranked != list(range(requests)):
            moved = chain.from_iterable(range(starts[request], starts[request + 1]) for request in ranked)
            reordering = Reordering(self._to_device(ranked, torch.int64), self._to_device(list(moved), torch.int64))
        if count < requests:
            contexts = context_lens_of(common).tolist()
            sizes = [(request, contexts[request], lengths[request]) for request in ranked[count:]]
            prefills = self._prefill(sizes, checkpoints)
            tokens = sum(lengths[request] for request in ranked[:count])
        else:
            count, tokens = common.num_reqs, common.num_actual_tokens
        metadata = KdaMetadata(
            num_requests=requests,
            num_tokens=common.num_actual_tokens,
            num_decodes=count,
            num_decode_tokens=tokens,
            decode_state_indices=self.state_indices,
            prefill_state_indices=self.state_indices[:0, 0],
            prefill_checkpoints=None,
            spec_decode=self._spec_decode(common, num_accepted_tokens, reordering, count),
            prefill=prefills,
            reordering=reordering,
        )
        state_indices = self._state_indices(common.block_table_tensor, common.seq_lens)
        return self._with_state_indices(metadata, state_indices)

    def _prefill(self, sizes: list[tuple[int, int, int]], checkpoints: Sequence[StateCheckpoints | None]) -> Prefill:
        """`sizes`: (request, tokens before this step, tokens in it) of each."""
        kept, offsets, before = [], [], 0
        for request, context, length in sizes:
            if request < len(checkpoints) and (found := checkpoints[request]):
                kept.append(found)
                offsets += [before + position - context for position in found.positions]
            before += length
        return Prefill(
            cu_seqlens=self._to_device([0, *accumulate(length for _, _, length in sizes)], torch.int32),
            has_initial_state=self._to_device([context > 0 for _, context, _ in sizes], torch.bool),
            checkpoints=tuple(kept),
            checkpoint_offsets=self._to_device(offsets, torch.int32),
        )

    def _spec_decode(
        self,
        common: CommonAttentionMetadata,
        num_accepted_tokens: torch.Tensor | None,
        reordering: Reordering | None,
        count: int,
    ) -> SpecDecode | None:
        if not self.draft_tokens:
            return None
        cu_seqlens = common.query_start_loc
        if num_accepted_tokens is None:
            num_accepted_tokens = torch.ones_like(self.num_accepted_tokens)
        if reordering is not None:
            lengths = common.query_start_loc.diff()[reordering.requests]
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            num_accepted_tokens = num_accepted_tokens[reordering.requests]
        return SpecDecode(
            self.cu_seqlens[: count + 1].copy_(cu_seqlens[: count + 1]),
            self.num_accepted_tokens[:count].copy_(num_accepted_tokens[:count]),
        )

    def _state_indices(self, block_table: torch.Tensor, seq_lens: torch.Tensor | None) -> torch.Tensor:
        """[requests, K] int32: the state indices of this group's layers."""
        aligned = getattr(self, "mamba_aligned_state_indices", None)
        if aligned is not None:
            return aligned
        mode = self.vllm_config.cache_config.mamba_cache_mode
        return mamba_get_block_table_tensor(block_table, seq_lens, self.kv_cache_spec, mode)

    def _with_state_indices(self, metadata: KdaMetadata, state_indices: torch.Tensor) -> KdaMetadata:
        """`metadata` with this group's states. Every group in every step: where all decode, it must cost little."""
        requests, count, prefills = metadata.num_requests, metadata.num_decodes, metadata.prefill
        if metadata.reordering is not None:
            state_indices = state_indices[metadata.reordering.requests]
        as_they_lie = state_indices is getattr(self, "mamba_aligned_state_indices", None) and not self.draft_tokens
        if as_they_lie:  # in the runner's buffer, which stays in its place and is filled up with null states
            decoding = state_indices[:count]
        else:
            decoding = self.state_indices[:count]
            decoding[:requests].copy_(state_indices[: min(requests, count), : self.state_indices.shape[1]])
            decoding[requests:].zero_()
        if prefills is None:
            return replace(metadata, decode_state_indices=decoding)
        kept_states = None
        if prefills.checkpoints:
            blocks = list(chain.from_iterable(found.blocks[self.group] for found in prefills.checkpoints))
            kept_states = PrefillCheckpoints(prefills.checkpoint_offsets, self._to_device(blocks, torch.int32))
        ours = state_indices[count:requests, 0].contiguous()
        return replace(
            metadata, decode_state_indices=decoding, prefill_state_indices=ours, prefill_checkpoints=kept_states
        )

    def _to_device(self, values: list[int] | list[bool], dtype: torch.dtype) -> torch.Tensor:
        return async_tensor_h2d(values, self.device, dtype)


class KdaBackend(AttentionBackend):
    """What vLLM knows a KDA layer's state by: a name and how to build its metadata."""

    @staticmethod
    def get_name() -> str:
        return "KIMI_KDA"

    @staticmethod
    def get_builder_cls() -> type[KdaMetadataBuilder]:
        return KdaMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Whole blocks one behind the other, so that a block can be latents or states (`CacheLayout`)."""
        return (KVCacheLayout.BLHNC,)
