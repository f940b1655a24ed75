"""Latent attention on the CPU: one backend for every x86 and Arm chip, fp32 or bf16.

vLLM picks a CPU backend by the chip (AMX or not), computes the prefill over a cached context with a gather
made for CUDA, and prepares workspaces for it. Here decode tokens use vLLM's own kernel over the latent cache;
prefill tokens attend tile by tile and merge the tiles by their log-sum-exp, so that memory grows with the tile
and not with queries x context. Many tokens attend to expanded keys and values, few to the latents themselves.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import torch
from vllm import _custom_ops
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.v1.attention.backend import (
    AttentionLayer,
    AttentionType,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kimi_linear.attention.cpu_mla_metadata import (
    LatentMetadata,
    LatentMetadataBuilder,
    LatentPrefill,
    as_kernel_blocks,
)
from vllm_kimi_linear.cache.layout import KERNEL_BLOCK

CONTEXT_TILE = 1024  # cached tokens expanded at a time
QUERY_TILE = 1024  # query tokens attended at a time
# Up to so many tokens it costs less to bring the queries to the latents, 1152 products a token, head and cached token,
# than to expand every cached token for each head, 512 * 256, and then take 384.
FEW_TOKENS = 128


class CpuLatentBackend(MLACommonBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "KIMI_CPU_MLA"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        # Any multiple: were the runner to split blocks for us, its `_zero_block_ids` would clear, by manager
        # block number, kernel blocks that belong to other requests.
        return [MultipleOf(KERNEL_BLOCK)]

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type["CpuLatentImpl"]:
        return CpuLatentImpl


class CpuLatentImpl(MLAAttentionImpl[LatentMetadata]):
    """The two attention paths; vLLM's MLAAttention absorbs W_UK and W_UV around the decode path."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        if any((alibi_slopes, sliding_window, logits_soft_cap, kv_sharing_target_layer_name)) or (
            attn_type != AttentionType.DECODER
        ):
            raise NotImplementedError("latent attention on the CPU is causal self-attention over one cache only")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.latent_dim: int = mla_args["kv_lora_rank"]
        self.nope_dim: int = mla_args["qk_nope_head_dim"]
        self.key_dim: int = mla_args["qk_head_dim"]
        self.value_dim: int = mla_args["v_head_dim"]
        self.kv_b_proj = mla_args["kv_b_proj"]
        self.dcp_world_size = 1

    @cached_property
    def expansion(self) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_b_proj, however it is packed, as a matrix to keys and one to values: [heads, 512, 128] each."""
        both = self.kv_b_proj(torch.eye(self.latent_dim, dtype=self.kv_b_proj.params_dtype))[0]
        both = both.view(self.latent_dim, self.num_heads, -1).transpose(0, 1)
        return both[..., : self.nope_dim].contiguous(), both[..., self.nope_dim :].contiguous()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """After a reload of weights, too: what was derived from the old ones goes."""
        self.__dict__.pop("expansion", None)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Write latents [T, 512] and shared keys [T, 1, 64] to the slots of `slot_mapping` [T]; -1 skips."""
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten().long()
        entries = torch.cat([kv_c_normed, k_pe.flatten(1)], dim=-1)
        if (slots < 0).any():
            entries, slots = entries[slots >= 0], slots[slots >= 0]
        block = kv_cache.shape[1]
        kv_cache[slots // block, slots % block] = entries

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode tokens: absorbed queries [n, heads, 576] against the latent cache -> [n, heads, 512]."""
        decode = attn_metadata.decode
        assert decode is not None
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q.contiguous()
        out = query.new_zeros(query.shape[0], self.num_heads, self.latent_dim)
        cache = as_kernel_blocks(kv_c_and_k_pe_cache)
        _custom_ops.mla_decode_kvcache_cpu(out, query, cache, self.scale, decode.block_table, decode.seq_lens)
        return out, None

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Prefill tokens: q [n, heads, 192], latents [n, 512], shared keys [n, 1, 64]; writes output [n, heads*128]."""
        output = output.view(-1, self.num_heads, self.value_dim)
        for request in attn_metadata.prefill:
            tokens = slice(request.first_token, request.first_token + request.num_tokens)
            fresh = torch.cat([kv_c_normed[tokens], k_pe[tokens].flatten(1)], dim=-1)
            few = request.num_tokens <= min(FEW_TOKENS, request.context_len)
            attend = self._attend_few if few else self._attend
            output[tokens] = attend(q[tokens], fresh, _context_tiles(kv_c_and_k_pe_cache, request))

    def _attend(self, query: torch.Tensor, fresh: torch.Tensor, context: Iterable[torch.Tensor]) -> torch.Tensor:
        """Causal attention of one request's tokens over its cached entries, by tiles, and over themselves.

        query [n, heads, 192], fresh [n, 576], tiles [up to CONTEXT_TILE, 576] -> [n, heads, 128] fp32.
        """
        tiles = query.split(QUERY_TILE)
        partials = [_Partial() for _ in tiles]
        for entries in context:
            keys, values = self._expand(entries)
            for tile, partial in zip(tiles, partials, strict=True):
                partial.add(*self._flash(tile, keys, values, causal=False))
        for first, entries in enumerate(fresh.split(QUERY_TILE)):
            keys, values = self._expand(entries)
            for i in range(first, len(tiles)):
                partials[i].add(*self._flash(tiles[i], keys, values, causal=i == first))
        return torch.cat([partial.out for partial in partials], dim=1).transpose(0, 1)[..., : self.value_dim]

    def _attend_few(self, query: torch.Tensor, fresh: torch.Tensor, context: Iterable[torch.Tensor]) -> torch.Tensor:
        """The same for few tokens: scores and sums over latents, as in decoding."""
        to_keys, to_values = self.expansion
        nope, shared = query.transpose(0, 1).split([self.nope_dim, self.key_dim - self.nope_dim], dim=-1)
        absorbed = torch.cat([nope @ to_keys.mT, shared], dim=-1).transpose(0, 1)
        partial = _Partial()
        for entries in chain(context, (fresh,)):
            heads = entries.unsqueeze(0).expand(self.num_heads, -1, -1)
            partial.add(*self._flash(absorbed, heads, heads, causal=entries is fresh))
        return (partial.out[..., : self.latent_dim].to(to_values.dtype) @ to_values).transpose(0, 1)

    def _expand(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache entries [n, 576] -> keys and values [heads, n, 192]; values are zero-padded to the key width."""
        latent, shared = entries.split([self.latent_dim, self.head_size - self.latent_dim], dim=-1)
        expanded = self.kv_b_proj(latent.contiguous())[0].view(-1, self.num_heads, self.nope_dim + self.value_dim)
        keys = torch.cat([expanded[..., : self.nope_dim], shared.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1)
        values = torch.nn.functional.pad(expanded[..., self.nope_dim :], (0, self.key_dim - self.value_dim))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def _flash(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention [heads, n, 192] fp32 of one tile and its log-sum-exp [heads, n]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            is_causal=causal,
            scale=self.scale,
        )
        return out[0].float(), lse[0].float()


def _context_tiles(cache: torch.Tensor, request: LatentPrefill) -> Iterator[torch.Tensor]:
    """The request's cached entries, [up to CONTEXT_TILE, 576] at a time."""
    block = cache.shape[1]
    for start in range(0, request.context_len, CONTEXT_TILE):
        end = min(start + CONTEXT_TILE, request.context_len)
        pages = cache[request.blocks[start // block : -(-end // block)]].flatten(0, 1)
        first = start - start // block * block
        yield pages[first : first + end - start]


class _Partial:
    """Attention over the tiles seen so far, merged by log-sum-exp; every token attends to itself at least."""

    out: torch.Tensor
    lse: torch.Tensor | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        if self.lse is None:
            self.out, self.lse = out, lse
            return
        total = torch.logaddexp(self.lse, lse)
        self.out = self.out * (self.lse - total).exp().unsqueeze(-1) + out * (lse - total).exp().unsqueeze(-1)
        self.lse = total
