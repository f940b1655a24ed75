"""The small model's config.json: the original keys, 6 KDA layers and 2 of latent attention, 5.7 M parameters."""

from typing import Any

from examples.demo_model import words
from kimi_demo.presets import DEMO

CONFIG: dict[str, Any] = DEMO | {
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_size": 224,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "vocab_size": words.VOCABULARY_SIZE,
    "linear_attn_config": DEMO["linear_attn_config"] | {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]},
}


def config() -> dict[str, Any]:
    known = words.vocabulary()
    ends = {"bos_token_id": "[BOS]", "eos_token_id": "<|im_end|>", "pad_token_id": "[PAD]"}
    return dict(sorted((CONFIG | {key: known.special_id(name) for key, name in ends.items()}).items()))
