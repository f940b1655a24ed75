"""A field of config.json that holds another kind of value ends in one sentence that names it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes

ORIGINAL = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
LINEAR = ORIGINAL["linear_attn_config"]
# As transformers saves it.
SAVED = {name: value for name, value in ORIGINAL.items() if name != "linear_attn_config"} | {
    "layer_types": ["linear_attention" if i + 1 in LINEAR["kda_layers"] else "full_attention" for i in range(27)],
    "mlp_layer_types": ["dense"] + ["sparse"] * 26,
    "linear_num_heads": LINEAR["num_heads"],
    "linear_head_dim": LINEAR["head_dim"],
    "linear_conv_kernel_dim": LINEAR["short_conv_kernel_size"],
}
SCALARS = (
    "model_type hidden_act mla_use_nope hidden_size vocab_size num_hidden_layers model_max_length intermediate_size "
    "rms_norm_eps tie_word_embeddings num_attention_heads num_key_value_heads qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim kv_lora_rank q_lora_rank num_experts first_k_dense_replace moe_layer_freq moe_router_activation_func "
    "num_expert_group topk_group num_experts_per_token moe_intermediate_size num_shared_experts moe_renormalize "
    "routed_scaling_factor topk_method num_nextn_predict_layers attention_bias "
    "linear_attn_config.num_heads linear_attn_config.head_dim linear_attn_config.short_conv_kernel_size"
)
LISTS = "architectures layer_types mlp_layer_types linear_attn_config.kda_layers linear_attn_config.full_attn_layers"
OBJECTS = "linear_attn_config rope_parameters quantization_config"

NO_SCALARS: tuple[Any, ...] = ([5], ["text"], [], {"key": 5})
NO_LISTS: tuple[Any, ...] = (5, 1.5, True, "text", {"key": 5}, [[5]], [{}], [None])
NO_OBJECTS: tuple[Any, ...] = (5, 1.5, True, "text", [5], ["text"])
CASES = [
    (field, value)
    for fields, values in ((SCALARS, NO_SCALARS), (LISTS, NO_LISTS), (OBJECTS, NO_OBJECTS))
    for field in fields.split()
    for value in values
]


def test_what_transformers_saves_is_the_same_model() -> None:
    assert ModelSizes.from_config(SAVED) == ModelSizes.from_config(ORIGINAL)


@pytest.mark.parametrize(("field", "value"), CASES)
def test_another_kind_of_value(field: str, value: Any) -> None:
    config = copy.deepcopy(SAVED if field in SAVED and field not in ORIGINAL else ORIGINAL)
    inner, _, name = field.rpartition(".")
    (config[inner] if inner else config)[name] = value
    with pytest.raises(ConfigError) as caught:
        ModelSizes.from_config(config)
    sentence = str(caught.value)
    assert sentence.startswith(f"{field} is ") and ";" in sentence and "\n" not in sentence
