"""Kimi Linear as something to train: docs/kda.md in differentiable torch, parameters named as in the checkpoint.

On a GPU the recurrence is fla-core's `chunk_kda`; on a CPU it is this project's own reference, which is slow.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_kimi_linear.config.model import LATENT_NORM_EPS, ModelSizes

EPS = 1e-5


class Norm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, in fp32."""

    def __init__(self, size: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Convolution(nn.Module):
    """Section 2: each channel's causal convolution of four tokens, then SiLU. [B, T, C] -> [B, T, C]."""

    KERNEL_SIZE = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        weight = torch.zeros(channels, 1, self.KERNEL_SIZE).uniform_(-0.5, 0.5)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, self.KERNEL_SIZE - 1, 0))
        weights = self.weight[:, 0].to(x.dtype).unbind(1)
        shifted = (padded[:, i : i + x.shape[1]] * weight for i, weight in enumerate(weights))
        return F.silu(sum(shifted, start=torch.zeros((), dtype=x.dtype, device=x.device)))


class DeltaAttention(nn.Module):
    """Sections 1 to 5. [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, hidden: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim, width = heads, dim, heads * dim
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden, width) for _ in "qkv")
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Convolution(width) for _ in "qkv")
        self.f_a_proj, self.f_b_proj = linear(hidden, dim), linear(dim, width)
        self.g_a_proj, self.g_b_proj = linear(hidden, dim), linear(dim, width)
        self.b_proj = linear(hidden, heads)
        self.A_log = nn.Parameter(torch.empty(1, 1, heads, 1).uniform_(1, 16).log())
        dt = torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.o_norm = Norm(dim)
        self.o_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.dim)
        q, k, v = (
            conv(project(x)).view(shape)
            for conv, project in (
                (self.q_conv1d, self.q_proj),
                (self.k_conv1d, self.k_proj),
                (self.v_conv1d, self.v_proj),
            )
        )
        raw_g = self.f_b_proj(self.f_a_proj(x)).view(shape)
        output_gate = self.g_b_proj(self.g_a_proj(x)).view(shape)
        out = recurrence(q, k, v, raw_g, self.b_proj(x), self.A_log.view(-1), self.dt_bias)
        return self.o_proj((self.o_norm(out).float() * output_gate.float().sigmoid()).to(x.dtype).flatten(2))


def recurrence(q: Tensor, k: Tensor, v: Tensor, raw_g: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """q, k, v, raw_g [B, T, H, D], beta [B, T, H] before its sigmoid -> o [B, T, H, D] of section 4."""
    beta = beta.float().sigmoid()
    if q.is_cuda:
        out, _ = _chunk_kda()(
            q,
            k,
            v,
            raw_g,
            beta.to(q.dtype),
            A_log=a_log,
            dt_bias=dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
        )
        return out
    from kda_kernels import reference

    batch, _, heads, dim = q.shape
    g = reference.kda_gate(raw_g.float(), a_log, dt_bias)
    q, k = reference.l2norm(q.float()) * dim**-0.5, reference.l2norm(k.float())
    # Heads of all sequences side by side, as the reference takes one sequence.
    q, k, v32, g, beta = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v.float(), g, beta))
    out, _ = reference.chunk_kda(q, k, v32, g, beta, torch.zeros(batch * heads, dim, dim))
    return out.unflatten(1, (batch, heads)).transpose(0, 1).to(v.dtype)


@cache
def _chunk_kda() -> Callable[..., tuple[Tensor, Tensor]]:
    """fla-core's differentiable KDA. It tries up to 24 compilations of each kernel, for minutes; here it tries two."""
    from triton.runtime.autotuner import Autotuner

    initialise = Autotuner.__init__

    def with_few(self, fn, arg_names, configs, *args, **kwargs):
        few = [configs[len(configs) // 3], configs[2 * len(configs) // 3]] if len(configs) > 2 else configs
        initialise(self, fn, arg_names, few, *args, **kwargs)

    Autotuner.__init__ = with_few
    try:
        from fla.ops.kda import chunk_kda
    finally:
        Autotuner.__init__ = initialise
    return chunk_kda


class LatentAttention(nn.Module):
    """Section 9, expanded: training needs no cache. [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, g: ModelSizes) -> None:
        super().__init__()
        self.model_sizes = g
        self.q_proj = linear(g.hidden_size, g.attention_heads * (g.qk_nope_head_dim + g.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = linear(g.hidden_size, g.kv_lora_rank + g.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(g.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = linear(g.kv_lora_rank, g.attention_heads * (g.qk_nope_head_dim + g.v_head_dim))
        self.o_proj = linear(g.attention_heads * g.v_head_dim, g.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        g = self.model_sizes
        query = self.q_proj(x).unflatten(2, (g.attention_heads, -1))
        latent, shared = self.kv_a_proj_with_mqa(x).split([g.kv_lora_rank, g.qk_rope_head_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(2, (g.attention_heads, -1))
        key, value = expanded.split([g.qk_nope_head_dim, g.v_head_dim], dim=-1)
        key = torch.cat([key, shared.unsqueeze(2).expand(-1, -1, g.attention_heads, -1)], dim=-1)
        value = F.pad(value, (0, query.shape[-1] - g.v_head_dim))  # the fused kernels want equal sizes
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out[..., : g.v_head_dim].transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, width),
            linear(hidden, width),
            linear(width, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Weights [T, experts] of the chosen experts, zero elsewhere; the bias that balances them moves in `train.py`."""

    def __init__(self, g: ModelSizes) -> None:
        super().__init__()
        self.model_sizes = g
        self.weight = nn.Parameter(torch.randn(g.num_experts, g.hidden_size) * g.hidden_size**-0.5)
        self.e_score_correction_bias = nn.Buffer(torch.zeros(g.num_experts))
        self.load = torch.zeros(g.num_experts)  # of the last call: share of the tokens that chose each expert

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.model_sizes.experts_per_token, dim=-1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        self.load = mask.detach().flatten(0, -2).mean(0)
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.model_sizes.routed_scaling_factor


class Experts(nn.Module):
    """So few and small that each computes every token; those not chosen count nothing."""

    def __init__(self, g: ModelSizes) -> None:
        super().__init__()
        self.model_sizes = g
        self.gate = Router(g)
        experts, width, hidden = g.num_experts, g.moe_intermediate_size, g.hidden_size
        self.w1, self.w3 = (nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5) for _ in "13")
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) * (2 * g.num_layers * width) ** -0.5)
        self.shared_experts = Mlp(g.hidden_size, g.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(F.linear(x, self.w1.flatten(0, 1))) * F.linear(x, self.w3.flatten(0, 1))
        weighed = inner.unflatten(-1, (self.model_sizes.num_experts, -1)) * self.gate(x).to(inner.dtype).unsqueeze(-1)
        return F.linear(weighed.flatten(-2), self.w2.transpose(0, 1).flatten(1)) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, g: ModelSizes, index: int) -> None:
        super().__init__()
        full = g.layer_types[index] == "mla"
        self.input_layernorm, self.post_attention_layernorm = Norm(g.hidden_size), Norm(g.hidden_size)
        self.self_attn = LatentAttention(g) if full else DeltaAttention(g.hidden_size, g.kda_heads, g.kda_head_dim)
        self.dense = not g.layer_moe[index]
        if self.dense:
            self.mlp = Mlp(g.hidden_size, g.intermediate_size)
        else:
            self.block_sparse_moe = Experts(g)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        block = self.mlp if self.dense else self.block_sparse_moe
        return x + block(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, g: ModelSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(g, index) for index in range(g.num_layers))
        self.norm = Norm(g.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class KimiLinear(nn.Module):
    """Token ids [B, T] -> hidden rows [B, T, hidden]; `lm_head` makes logits of those that are wanted."""

    def __init__(self, g: ModelSizes) -> None:
        super().__init__()
        self.model = Body(g)
        self.lm_head = linear(g.hidden_size, g.vocab_size)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data /= math.sqrt(2 * g.num_layers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def checkpoint(self) -> dict[str, Tensor]:
        """The tensors by the checkpoint's names: bf16, but for what the original keeps in fp32."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            exact = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
            value = value.detach().cpu().to(torch.float32 if exact else torch.bfloat16)
            place, _, last = name.rpartition(".")
            if last in ("w1", "w2", "w3"):
                parts = {f"{place}.experts.{n}.{last}.weight": part.clone() for n, part in enumerate(value)}
                tensors |= parts
            else:
                tensors[name] = value.clone()
        return tensors


def linear(columns: int, rows: int) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=columns**-0.5)
    return layer
