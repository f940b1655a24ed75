"""NoPE MLA, thin over vLLM's own attention layer (docs/kda.md section 9)."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import divide, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from decode_kernels import interface
from vllm_kimi_linear.config.model import LATENT_NORM_EPS, ModelSizes
from vllm_kimi_linear.in_proj import InputProjection


class KimiLatentAttention(nn.Module):
    """Multi-head latent attention without rotary embedding: 512 latent and 64 shared key values a token.

    The 64 shared dimensions enter the score unrotated. On a CPU the attention runs on our own backend, so
    that machines with and without AMX compute the same; on a GPU vLLM chooses among its own.
    """

    def __init__(self, sizes: ModelSizes, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        g = sizes
        plain: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        self.num_heads = divide(g.attention_heads, get_tensor_model_parallel_world_size())
        self.latent_dim, self.shared_dim, self.value_dim = g.kv_lora_rank, g.qk_rope_head_dim, g.v_head_dim
        self.key_dim = g.qk_nope_head_dim + g.qk_rope_head_dim

        # q | kv_a, in the order of `parameters.MLA_IN_PROJ`; every rank needs kv_a whole.
        self.in_proj = InputProjection(
            g.hidden_size,
            {
                "split": {"q_proj": g.attention_heads * self.key_dim},
                "whole": {"kv_a_proj_with_mqa": self.latent_dim + self.shared_dim},
            },
            vllm_config.quant_config,
            f"{prefix}.in_proj",
        )
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=LATENT_NORM_EPS)
        self.kv_b_proj = ColumnParallelLinear(
            self.latent_dim,
            g.attention_heads * (g.qk_nope_head_dim + self.value_dim),
            bias=False,
            prefix=f"{prefix}.kv_b_proj",  # plain in any checkpoint: attention reads it
        )
        self.o_proj = RowParallelLinear(
            g.attention_heads * self.value_dim, g.hidden_size, prefix=f"{prefix}.o_proj", **plain
        )
        backend = None
        if current_platform.is_cpu():
            from vllm_kimi_linear.attention.cpu_mla import CpuLatentBackend

            backend = CpuLatentBackend
        self.attn = MLAAttention(
            num_heads=self.num_heads,
            scale=self.key_dim**-0.5,
            qk_nope_head_dim=g.qk_nope_head_dim,
            qk_rope_head_dim=g.qk_rope_head_dim,
            v_head_dim=self.value_dim,
            q_lora_rank=None,
            kv_lora_rank=self.latent_dim,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, hidden_size] after the input norm -> [T, hidden_size]."""
        projected, _ = self.in_proj(hidden_states)
        return self.o_proj(self.attend(projected))[0]

    def attend(self, projected: torch.Tensor) -> torch.Tensor:
        """What `in_proj` gives -> the input of `o_proj`, [T, heads * value_dim]."""
        query, latent, shared_key, *_ = projected.split(
            [self.num_heads * self.key_dim, self.latent_dim, self.shared_dim, *self.in_proj.local_sizes[2:]], dim=-1
        )
        return self.attn(
            query.reshape(-1, self.num_heads, self.key_dim),
            self.kv_a_layernorm(latent),
            shared_key.unsqueeze(1),
            output_shape=(len(projected), self.num_heads * self.value_dim),
        )

    def decode(self, projected: torch.Tensor) -> torch.Tensor:
        """`attend` of a step that `DecodeStep` takes: vLLM's attention on the latents, between kernels of our own."""
        attn, backend = self.attn, self.attn.impl
        if backend.dcp_world_size > 1 or attn.q_pad_num_heads or attn.kv_cache.dtype != projected.dtype:
            return self.attend(projected)  # vLLM's layer does more there
        kernels = interface.kernels(projected.device.type)
        context = get_forward_context()
        metadata, slot_mapping = context.attn_metadata[attn.layer_name], context.slot_mapping[attn.layer_name]
        nope = self.key_dim - self.shared_dim
        kv_b, norm = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)), self.kv_a_layernorm
        latents = kernels.latent_query(
            projected, kv_b, norm.weight, norm.variance_epsilon, attn.kv_cache, slot_mapping, nope
        )
        query = projected[:, : self.num_heads * self.key_dim].unflatten(1, (self.num_heads, self.key_dim))
        mixed, _ = backend.forward_mqa((latents, query[..., nope:]), attn.kv_cache, metadata, attn)
        return kernels.latent_value(mixed, kv_b, nope)
