"""Sizes of the small checkpoints, as config.json of the original layout has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kimi_demo.tokenizer import build_vocabulary

DEMO: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 512,
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 4,
    "num_expert_group": 1,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 1024,
    "linear_attn_config": {"head_dim": 64, "num_heads": 4, "short_conv_kernel_size": 4},
}

# The layer sizes of the 48B with few layers and experts: 723 M parameters.
BENCH = DEMO | {
    "head_dim": 72,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_token": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 32,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 32768,
    "linear_attn_config": {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
}


def _every_fourth(layers: int) -> list[int]:
    return [n for n in range(1, layers + 1) if n % 4 == 0]


@dataclass(frozen=True)
class Preset:
    config: dict[str, Any]
    full_attn_layers: Callable[[int], list[int]]  # number of layers -> 1-based MLA layers


PRESETS = {
    "demo": Preset(DEMO, _every_fourth),
    "bench": Preset(BENCH, _every_fourth),
    "all-mla": Preset(DEMO | {"num_hidden_layers": 4}, lambda n: list(range(1, n + 1))),
    "one-mla": Preset(DEMO | {"num_hidden_layers": 4}, lambda n: [n]),
    "dense": Preset(DEMO | {"num_hidden_layers": 4, "num_experts": None, "num_experts_per_token": None}, _every_fourth),
}


def demo_config(preset: str = "demo", layers: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a preset, with the original checkpoint's keys.

    Raises ValueError if `layers` is too small for an MLA layer.
    """
    chosen = PRESETS[preset]
    count = chosen.config["num_hidden_layers"] if layers is None else layers
    full = chosen.full_attn_layers(count)
    if count < 1 or not full:
        raise ValueError(f"--layers is {count}; preset {preset} needs enough layers to have an MLA layer among them")
    vocabulary = build_vocabulary(chosen.config["vocab_size"])
    config = chosen.config | {
        "dtype": dtype,
        "num_hidden_layers": count,
        "bos_token_id": vocabulary.special_id("[BOS]"),
        "eos_token_id": vocabulary.special_id("<|im_end|>"),
        "pad_token_id": vocabulary.special_id("[PAD]"),
        "linear_attn_config": chosen.config["linear_attn_config"]
        | {"full_attn_layers": full, "kda_layers": [n for n in range(1, count + 1) if n not in full]},
    }
    if config["num_experts"] is None:
        config["first_k_dense_replace"] = count
    return dict(sorted(config.items()))
