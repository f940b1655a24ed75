"""Per-batch metadata of latent attention on the CPU, and where its kernel finds the blocks of a layer's cache."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kimi_linear.attention.kda_metadata import context_lens_of
from vllm_kimi_linear.cache.layout import KERNEL_BLOCK


@dataclass(frozen=True)
class LatentDecode:
    block_table: torch.Tensor  # [num_decodes, blocks] int32, blocks of KERNEL_BLOCK tokens
    seq_lens: torch.Tensor  # [num_decodes] int32


@dataclass(frozen=True)
class LatentPrefill:
    """One prefill request of the step: its tokens among the prefill tokens and its cached context."""

    first_token: int
    num_tokens: int
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


def num_decodes(common: CommonAttentionMetadata, context_lens: torch.Tensor) -> int:
    """How many requests, at the start of the batch, are of one token that continues a sequence.

    A prompt of one token is a prefill, because its state must start from zero. vLLM sorts a batch so that decode tokens
    come first (`reorder_batch_to_split_decodes_and_prefills`), so the first request that is no decode ends them.
    """
    is_decode = (common.query_start_loc_cpu.diff() == 1) & (context_lens > 0)
    return int(is_decode.int().cumprod(0).sum())


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
        common, contexts = common_attn_metadata, context_lens_of(common_attn_metadata)
        decodes = num_decodes(common, contexts)
        decode = None
        if decodes:
            used = -(-int(common.seq_lens[:decodes].max()) // self.block_size)
            blocks = common.block_table_tensor[:decodes, :used]
            block_table = split_block_table(blocks, self.block_size, kernel_blocks_apart(self.layer.kv_cache))
            decode = LatentDecode(block_table.to(torch.int32), common.seq_lens[:decodes].to(torch.int32))
        starts = common.query_start_loc_cpu.tolist()
        prefill = tuple(
            LatentPrefill(
                first_token=starts[i] - starts[decodes],
                num_tokens=starts[i + 1] - starts[i],
                context_len=context,
                blocks=common.block_table_tensor[i, : -(-context // self.block_size)].long(),
            )
            for i, context in enumerate(contexts.tolist()[decodes:], decodes)
        )
        return LatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=decodes,
            num_prefills=common.num_reqs - decodes,
            decode=decode,
            prefill=prefill,
        )
