"""Every tensor of the original checkpoint. Standard library only."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_kimi_linear.config.model import ModelSizes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of the original checkpoint."""

    name: str
    shape: Shape
    split: bool  # divided among tensor-parallel ranks, or a copy on each
    layer: int | None = None  # None for embedding, final norm and output matrix
    fp32: bool = False  # stored in fp32 whatever the model's dtype

    @property
    def linear_layer(self) -> str | None:
        """Its layer's name where it is the matrix of a linear layer, which a checkpoint may quantise."""
        stem, _, kind = self.name.rpartition(".")
        others = stem.endswith("embed_tokens") or stem.endswith(".gate")  # the router is a module of its own
        return stem if kind == "weight" and len(self.shape) == 2 and not others else None


def weights(model_sizes: ModelSizes) -> Iterator[Weight]:
    """Every tensor of the original checkpoint, whole shapes (docs/kda.md sections 1 and 9)."""
    g = model_sizes
    yield Weight("model.embed_tokens.weight", (g.vocab_size, g.hidden_size), True)
    for layer, (kind, moe) in enumerate(zip(g.layer_types, g.layer_moe, strict=True)):
        at = f"model.layers.{layer}"
        attention = _kda_weights(g) if kind == "kda" else _mla_weights(g)
        feed_forward = _moe_weights(g) if moe else _mlp_weights("mlp", g.hidden_size, g.intermediate_size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Weight(f"{at}.{norm}.weight", (g.hidden_size,), False, layer)
        for name, shape, split in attention:
            fp32 = name in ("A_log", "dt_bias")
            yield Weight(f"{at}.self_attn.{name}", shape, split, layer, fp32)
        for name, shape, split in feed_forward:
            yield Weight(f"{at}.{name}", shape, split, layer, name.endswith("e_score_correction_bias"))
    yield Weight("model.norm.weight", (g.hidden_size,), False)
    if not g.tied_embeddings:
        yield Weight("lm_head.weight", (g.vocab_size, g.hidden_size), True)


def _kda_weights(g: ModelSizes) -> Iterator[tuple[str, Shape, bool]]:
    size, dim = g.kda_size, g.kda_head_dim
    for part in "qkv":
        yield f"{part}_proj.weight", (size, g.hidden_size), True
        yield f"{part}_conv1d.weight", (size, 1, g.conv_kernel_size), True
    yield "A_log", (1, 1, g.kda_heads, 1), True
    yield "dt_bias", (size,), True
    yield "b_proj.weight", (g.kda_heads, g.hidden_size), True
    for gate in "fg":
        yield f"{gate}_a_proj.weight", (dim, g.hidden_size), False
        yield f"{gate}_b_proj.weight", (size, dim), True
    yield "o_norm.weight", (dim,), False
    yield "o_proj.weight", (g.hidden_size, size), True


def _mla_weights(g: ModelSizes) -> Iterator[tuple[str, Shape, bool]]:
    heads = g.attention_heads
    yield "q_proj.weight", (heads * (g.qk_nope_head_dim + g.qk_rope_head_dim), g.hidden_size), True
    yield "kv_a_proj_with_mqa.weight", (g.latent_size, g.hidden_size), False
    yield "kv_a_layernorm.weight", (g.kv_lora_rank,), False
    yield "kv_b_proj.weight", (heads * (g.qk_nope_head_dim + g.v_head_dim), g.kv_lora_rank), True
    yield "o_proj.weight", (g.hidden_size, heads * g.v_head_dim), True


def _mlp_weights(at: str, hidden: int, width: int) -> Iterator[tuple[str, Shape, bool]]:
    yield f"{at}.gate_proj.weight", (width, hidden), True
    yield f"{at}.up_proj.weight", (width, hidden), True
    yield f"{at}.down_proj.weight", (hidden, width), True


def _moe_weights(g: ModelSizes) -> Iterator[tuple[str, Shape, bool]]:
    at, width = "block_sparse_moe", g.moe_intermediate_size
    yield f"{at}.gate.weight", (g.num_experts, g.hidden_size), False
    yield f"{at}.gate.e_score_correction_bias", (g.num_experts,), False
    for expert in range(g.num_experts):
        yield f"{at}.experts.{expert}.w1.weight", (width, g.hidden_size), True
        yield f"{at}.experts.{expert}.w2.weight", (g.hidden_size, width), True
        yield f"{at}.experts.{expert}.w3.weight", (width, g.hidden_size), True
    if g.shared_experts:
        yield from _mlp_weights(f"{at}.shared_experts", g.hidden_size, width * g.shared_experts)
