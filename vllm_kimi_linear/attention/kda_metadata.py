"""Per-batch metadata of the KDA layers: which rows decode, which prefill, and which state slot is whose.

vLLM hands every step to us as rows of tokens, requests one after another, as a rule those that only decode first. The
split is made here, once a step; the layers only slice.

A CUDA graph of a decode step replays with the addresses it was captured with: what such a step reads lies in
buffers of the builder, filled up with null slots to the size of the graph.
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


def _context_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """[num_requests] int32, host: tokens computed before this step; with drafts in flight perhaps too many."""
    seq_lens = common.seq_lens_cpu_upper_bound
    if seq_lens is None:
        seq_lens = common.seq_lens.cpu()
    return seq_lens[: common.num_reqs] - common.query_start_loc_cpu.diff()


@dataclass(frozen=True)
class RowSplit:
    """Where the decode rows of a step end and its prefill requests begin.

    Decode rows are single tokens that continue a sequence; a prompt of one token is a prefill, because
    its state must start from zero. vLLM sorts a batch so that the decode rows come first
    (`reorder_batch_to_split_decodes_and_prefills`), one row a request.
    """

    num_requests: int
    num_tokens: int
    num_decodes: int
    query_start: torch.Tensor  # [num_requests + 1] int32, host
    context_lens: torch.Tensor  # [num_requests] int32, host: tokens computed before this step

    @property
    def num_prefills(self) -> int:
        return self.num_requests - self.num_decodes

    @classmethod
    def of(cls, common: CommonAttentionMetadata) -> "RowSplit":
        query_start = common.query_start_loc_cpu
        query_lens = query_start[1:] - query_start[:-1]
        context_lens = _context_lens(common)
        is_decode = (query_lens == 1) & (context_lens > 0)
        # Rows are sorted, so the first request that is no decode ends the decodes.
        num_decodes = int(torch.cumprod(is_decode.int(), dim=0).sum())
        return cls(common.num_reqs, common.num_actual_tokens, num_decodes, query_start, context_lens)


@dataclass(frozen=True)
class Drafts:
    """How the continuing requests verify drafted tokens, up to K rows each."""

    cu_seqlens: torch.Tensor  # [continuing + 1] int32
    accepted: torch.Tensor  # [continuing] int32: how many tokens of the last step stand, one or more


@dataclass(frozen=True)
class Prefills:
    cu_seqlens: torch.Tensor  # [prefills + 1] int32, counted from the first prefill row
    resume: torch.Tensor  # [prefills] bool: go on from the slot's state, else start from zero
    checkpoints: tuple[StateCheckpoints, ...]  # of those requests that keep states, in the order of the rows
    checkpoint_offsets: torch.Tensor  # [all their positions] int32: prefill rows before each


@dataclass(frozen=True)
class Order:
    """The batch's requests and rows, those that continue a sequence first, where vLLM has mixed them."""

    requests: torch.Tensor  # [num_requests] int64
    rows: torch.Tensor  # [num_tokens] int64


@dataclass(frozen=True)
class KdaMetadata:
    """One step as a KDA layer sees it: first the requests that continue a sequence, then the prefills.

    A continuing request has one row and one slot; with --speculative-config up to K rows, and K slots.
    """

    num_requests: int
    num_tokens: int
    continuing: int  # requests; with those that pad a CUDA graph, if there is no prefill
    continuing_tokens: int
    continuing_slots: torch.Tensor  # [continuing, K] int32
    prefill_slots: torch.Tensor  # [prefills] int32
    exports: PrefillCheckpoints | None  # states to be kept at block boundaries
    drafts: Drafts | None
    prefills: Prefills | None
    order: Order | None


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
        if vllm_config.additional_config.get("check_states") and not self.draft_tokens:
            aligned = vllm_config.cache_config.mamba_cache_mode == "align"
            self.check = StateCheck(kv_cache_spec.block_size if aligned else 0)
        requests = vllm_config.scheduler_config.max_num_seqs
        self.slots = torch.zeros(requests, 1 + self.draft_tokens, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.accepted = torch.ones(requests, dtype=torch.int32, device=device)
        # One group's metadata serves the other groups but for its slots, where the runner's graphs allow it.
        self.supports_update_block_table = device.type == "cuda" and vllm_config.use_v2_model_runner
        if self.supports_update_block_table:
            # The runner looks for this name, and then finds the slots of all groups in one launch.
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
        continuing = (lengths == 1) & (_context_lens(common_attn_metadata) > 0)
        if num_decode_draft_tokens_cpu is not None:
            continuing |= num_decode_draft_tokens_cpu >= 0
        return self._build(common_attn_metadata, continuing.tolist(), num_accepted_tokens)

    def update_block_table(
        self, metadata: KdaMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> KdaMetadata:
        """The metadata of another group of KDA layers, which differs in its slots alone."""
        self.checkpoints = ()
        return self._with_slots(metadata, self._group_slots(blk_table, None))

    def _build(
        self, common: CommonAttentionMetadata, continuing: list[bool], accepted: torch.Tensor | None
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
            table, contexts = common.block_table_tensor.tolist(), _context_lens(common).tolist()
            self.check.step(table, contexts, lengths[:requests], kept)
        ranked = sorted(range(requests), key=lambda request: not continuing[request])
        count = sum(continuing[:requests])
        order, prefills = None, None
        if ranked != list(range(requests)):
            rows = chain.from_iterable(range(starts[request], starts[request + 1]) for request in ranked)
            order = Order(self._to_device(ranked, torch.int64), self._to_device(list(rows), torch.int64))
        if count < requests:
            contexts = _context_lens(common).tolist()
            sizes = [(request, contexts[request], lengths[request]) for request in ranked[count:]]
            prefills = self._prefills(sizes, checkpoints)
            tokens = sum(lengths[request] for request in ranked[:count])
        else:
            count, tokens = common.num_reqs, common.num_actual_tokens
        metadata = KdaMetadata(
            num_requests=requests,
            num_tokens=common.num_actual_tokens,
            continuing=count,
            continuing_tokens=tokens,
            continuing_slots=self.slots,
            prefill_slots=self.slots[:0, 0],
            exports=None,
            drafts=self._drafts(common, accepted, order, count) if self.draft_tokens else None,
            prefills=prefills,
            order=order,
        )
        slots = self._group_slots(common.block_table_tensor, common.seq_lens)
        return self._with_slots(metadata, slots)

    def _prefills(self, sizes: list[tuple[int, int, int]], checkpoints: Sequence[StateCheckpoints | None]) -> Prefills:
        """`sizes`: (request, tokens before this step, tokens in it) of each."""
        kept, offsets, row = [], [], 0
        for request, context, length in sizes:
            if request < len(checkpoints) and (found := checkpoints[request]):
                kept.append(found)
                offsets += [row + position - context for position in found.positions]
            row += length
        return Prefills(
            cu_seqlens=self._to_device([0, *accumulate(length for _, _, length in sizes)], torch.int32),
            resume=self._to_device([context > 0 for _, context, _ in sizes], torch.bool),
            checkpoints=tuple(kept),
            checkpoint_offsets=self._to_device(offsets, torch.int32),
        )

    def _drafts(
        self, common: CommonAttentionMetadata, accepted: torch.Tensor | None, order: Order | None, count: int
    ) -> Drafts:
        cu_seqlens = common.query_start_loc
        if accepted is None:
            accepted = torch.ones_like(self.accepted)
        if order is not None:
            lengths = common.query_start_loc.diff()[order.requests]
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            accepted = accepted[order.requests]
        return Drafts(
            self.cu_seqlens[: count + 1].copy_(cu_seqlens[: count + 1]),
            self.accepted[:count].copy_(accepted[:count]),
        )

    def _group_slots(self, block_table: torch.Tensor, seq_lens: torch.Tensor | None) -> torch.Tensor:
        """[requests, K] int32: the slots of this group's layers."""
        aligned = getattr(self, "mamba_aligned_state_indices", None)
        if aligned is not None:
            return aligned
        mode = self.vllm_config.cache_config.mamba_cache_mode
        return mamba_get_block_table_tensor(block_table, seq_lens, self.kv_cache_spec, mode)

    def _with_slots(self, metadata: KdaMetadata, slots: torch.Tensor) -> KdaMetadata:
        """`metadata` with this group's slots. Every group in every step: where all decode, it must cost little."""
        requests, count, prefills = metadata.num_requests, metadata.continuing, metadata.prefills
        if metadata.order is not None:
            slots = slots[metadata.order.requests]
        as_they_lie = slots is getattr(self, "mamba_aligned_state_indices", None) and not self.draft_tokens
        if as_they_lie:  # in the runner's buffer, which stays in its place and is filled up with null slots
            continuing = slots[:count]
        else:
            continuing = self.slots[:count]
            continuing[:requests].copy_(slots[: min(requests, count), : self.slots.shape[1]])
            continuing[requests:].zero_()
        if prefills is None:
            return replace(metadata, continuing_slots=continuing)
        exports = None
        if prefills.checkpoints:
            blocks = list(chain.from_iterable(found.blocks[self.group] for found in prefills.checkpoints))
            exports = PrefillCheckpoints(prefills.checkpoint_offsets, self._to_device(blocks, torch.int32))
        ours = slots[count:requests, 0].contiguous()
        return replace(metadata, continuing_slots=continuing, prefill_slots=ours, exports=exports)

    def _to_device(self, values: list, dtype: torch.dtype) -> torch.Tensor:
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
