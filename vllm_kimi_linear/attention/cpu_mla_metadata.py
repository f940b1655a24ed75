"""Per-batch metadata of latent attention on the CPU, and where its kernel finds the blocks of a layer's cache."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kimi_linear.attention.kda_metadata import context_lens_of
from vllm_kimi_linear.cache.layout import KERNEL_BLOCK


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
        context_lens = context_lens_of(common)
        is_decode = (query_lens == 1) & (context_lens > 0)
        # Rows are sorted, so the first request that is no decode ends the decodes.
        num_decodes = int(torch.cumprod(is_decode.int(), dim=0).sum())
        return cls(common.num_reqs, common.num_actual_tokens, num_decodes, query_start, context_lens)


@dataclass(frozen=True)
class LatentDecode:
    block_table: torch.Tensor  # [num_decodes, blocks] int32, blocks of KERNEL_BLOCK tokens
    seq_lens: torch.Tensor  # [num_decodes] int32


@dataclass(frozen=True)
class LatentPrefill:
    """One prefill request of the step: its rows among the prefill rows and its cached context."""

    first_row: int
    num_rows: int
    context_len: int
    blocks: torch.Tensor  # [blocks] int64, manager blocks


@dataclass(frozen=True)
class LatentMetadata:
    """The attributes vLLM's MLAAttention reads, and what our two paths need."""

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: LatentDecode | None
    prefill: tuple[LatentPrefill, ...]


def kernel_blocks_apart(cache: torch.Tensor) -> int:
    """How many kernel blocks lie between the starts of two blocks of a layer's cache [blocks, tokens, width].

    The other layers' parts of a block are among them; its size is a multiple of a kernel block (`CacheLayout`).
    """
    return cache.stride(0) // (KERNEL_BLOCK * cache.shape[2])


def as_kernel_blocks(cache: torch.Tensor) -> torch.Tensor:
    """A view [kernel blocks, KERNEL_BLOCK, width] of all between the layer's first entry and its last."""
    blocks, tokens, width = cache.shape
    count = (blocks - 1) * kernel_blocks_apart(cache) + tokens // KERNEL_BLOCK
    return cache.as_strided((count, KERNEL_BLOCK, width), (KERNEL_BLOCK * width, width, 1))


def split_block_table(block_table: torch.Tensor, tokens: int, apart: int) -> torch.Tensor:
    """[n, blocks] of blocks of so many tokens -> [n, kernel blocks] of kernel blocks, numbered as in that view."""
    pieces = torch.arange(tokens // KERNEL_BLOCK, dtype=block_table.dtype)
    return (block_table.unsqueeze(-1) * apart + pieces).flatten(1)


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    kv_cache_spec: AttentionSpec
    reorder_batch_threshold: int = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        common = common_attn_metadata
        rows = RowSplit.of(common)
        decodes = rows.num_decodes
        decode = None
        if decodes:
            used = -(-int(common.seq_lens[:decodes].max()) // self.block_size)
            blocks = common.block_table_tensor[:decodes, :used]
            decode = LatentDecode(
                block_table=split_block_table(blocks, self.block_size, kernel_blocks_apart(self.layer.kv_cache)).to(
                    torch.int32
                ),
                seq_lens=common.seq_lens[:decodes].to(torch.int32),
            )
        starts = rows.query_start.tolist()
        contexts = rows.context_lens.tolist()
        prefill = tuple(
            LatentPrefill(
                first_row=starts[i] - starts[decodes],
                num_rows=starts[i + 1] - starts[i],
                context_len=contexts[i],
                blocks=common.block_table_tensor[i, : -(-contexts[i] // self.block_size)].long(),
            )
            for i in range(decodes, rows.num_requests)
        )
        return LatentMetadata(
            num_actual_tokens=rows.num_tokens,
            num_decodes=decodes,
            num_decode_tokens=decodes,
            num_prefills=rows.num_prefills,
            decode=decode,
            prefill=prefill,
        )
