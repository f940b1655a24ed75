"""Per-batch metadata of the KDA layers: which rows decode, which prefill, and which state slot is whose.

vLLM hands every step to us as rows of tokens, requests one after another, requests that only decode
first. The split is made here, once a step; the layers only slice.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec


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
        seq_lens = common.seq_lens_cpu_upper_bound
        if seq_lens is None:
            seq_lens = common.seq_lens.cpu()
        query_lens = query_start[1:] - query_start[:-1]
        context_lens = seq_lens[: common.num_reqs] - query_lens
        is_decode = (query_lens == 1) & (context_lens > 0)
        # Rows are sorted, so the first request that is no decode ends the decodes.
        num_decodes = int(torch.cumprod(is_decode.int(), dim=0).sum())
        return cls(common.num_reqs, common.num_actual_tokens, num_decodes, query_start, context_lens)


@dataclass(frozen=True)
class KdaMetadata:
    """One step as a KDA layer sees it. Decode rows are rows 0..num_decodes of the batch, the others follow."""

    num_tokens: int
    num_decodes: int
    num_prefills: int
    decode_slots: torch.Tensor  # [num_decodes] int32
    prefill_slots: torch.Tensor  # [num_prefills] int32
    prefill_cu_seqlens: torch.Tensor  # [num_prefills + 1] int32, counted from the first prefill row
    prefill_resume: torch.Tensor  # [num_prefills] bool: continue the slot's state, else start from zero


class KdaMetadataBuilder(AttentionMetadataBuilder[KdaMetadata]):
    kv_cache_spec: MambaSpec
    reorder_batch_threshold: int = 1

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KdaMetadata:
        rows = RowSplit.of(common_attn_metadata)
        slots = mamba_get_block_table_tensor(
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[: rows.num_requests, 0].contiguous()
        cu_seqlens = rows.query_start[rows.num_decodes :] - rows.query_start[rows.num_decodes]
        resume = rows.context_lens[rows.num_decodes :] > 0
        return KdaMetadata(
            num_tokens=rows.num_tokens,
            num_decodes=rows.num_decodes,
            num_prefills=rows.num_prefills,
            decode_slots=slots[: rows.num_decodes],
            prefill_slots=slots[rows.num_decodes :],
            prefill_cu_seqlens=cu_seqlens.to(self.device, non_blocking=True),
            prefill_resume=resume.to(self.device, non_blocking=True),
        )


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
