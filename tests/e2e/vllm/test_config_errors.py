"""A config.json that cannot be run stops the start with one sentence."""

from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from tests.support.starts import REMOVED, Refused, check_refused, linear, outcomes


def compressed(name: str) -> dict[str, Any]:
    """The quantization_config that compressed-tensors has for a scheme before anything is stored."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]).model_dump(mode="json")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}

REFUSED: Refused = {
    "a layer in both lists": (linear(full_attn_layers=[3, 4, 8]), {}, "linear_attn_config", "layer 3"),
    "a layer in neither list": (linear(full_attn_layers=[8]), {}, "linear_attn_config", "layer 4"),
    "a layer beyond the last": (linear(full_attn_layers=[4, 8, 9]), {}, "full_attn_layers", "layer 9"),
    "a layer 0": (linear(kda_layers=[0, 1, 2, 3, 5, 6, 7]), {}, "kda_layers", "layer 0"),
    "no MLA layer": (
        linear(full_attn_layers=[], kda_layers=list(range(1, 9))),
        {},
        "full_attn_layers",
        "[]",
    ),
    "no linear_attn_config": ({"linear_attn_config": REMOVED}, {}, "linear_attn_config", "missing"),
    "null linear_attn_config": ({"linear_attn_config": None}, {}, "linear_attn_config", "missing"),
    "no kda_layers": (linear(kda_layers=REMOVED), {}, "linear_attn_config.kda_layers", "missing"),
    "null full_attn_layers": (linear(full_attn_layers=None), {}, "full_attn_layers", "missing"),
    "no KDA head_dim": (linear(head_dim=REMOVED), {}, "linear_attn_config.head_dim", "missing"),
    "KDA head_dim": (linear(head_dim=48), {}, "linear_attn_config.head_dim", "48"),
    "convolution kernel size": (linear(short_conv_kernel_size=9), {}, "short_conv_kernel_size", "9"),
    "bounded gate": (linear(gate_lower_bound=-5.0), {}, "linear_attn_config.gate_lower_bound", "-5.0"),
    "heads over TP 3": ({}, {"tensor_parallel_size": 3}, "num_heads", "--tensor-parallel-size 3"),
    "heads over TP 8": ({}, {"tensor_parallel_size": 8}, "num_heads", "--tensor-parallel-size 8"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act", "'gelu'"),
    "router": ({"moe_router_activation_func": "softmax"}, {}, "moe_router_activation_func", "'softmax'"),
    "unknown router": ({"moe_router_activation_func": "tanh"}, {}, "moe_router_activation_func", "'tanh'"),
    "query latent": ({"q_lora_rank": 64}, {}, "q_lora_rank", "64"),
    "latent size on the CPU": ({"kv_lora_rank": 256}, {}, "kv_lora_rank", "256"),
    "shared key size on the CPU": ({"qk_rope_head_dim": 32}, {}, "qk_rope_head_dim", "32"),
    "no latent": ({"kv_lora_rank": None}, {}, "kv_lora_rank", "missing"),
    "no hidden_size": ({"hidden_size": REMOVED}, {}, "hidden_size", "missing"),
    "hidden_size is a word": ({"hidden_size": "abc"}, {}, "hidden_size", "'abc'"),
    "no heads": ({"num_attention_heads": 0}, {}, "num_attention_heads", "0"),
    "no layers": ({"num_hidden_layers": 0}, {}, "num_hidden_layers", "0"),
    "grouped heads": ({"num_key_value_heads": 2}, {}, "num_key_value_heads", "2"),
    "more experts chosen than there are": ({"num_experts_per_token": 9}, {}, "num_experts_per_token", "9"),
    "draft layers": ({"num_nextn_predict_layers": 1}, {}, "num_nextn_predict_layers", "1"),
    "rotary positions": ({"mla_use_nope": False}, {}, "mla_use_nope", "False"),
    "MLA output gate": ({"mla_use_output_gate": True}, {}, "mla_use_output_gate", "True"),
    "quantised checkpoint": ({"quantization_config": GPTQ}, {}, "quantization_config", "gptq"),
    **{
        f"quantised checkpoint, {name}": ({"quantization_config": compressed(name)}, {}, "quantization_config", word)
        for name, word in {"FP8_BLOCK": "fakequant", "NVFP4A16": "float of 4 bits", "W4A16_ASYM": "symmetric"}.items()
    },
    "overridden field": ({}, {"hf_overrides": {"q_lora_rank": 5}}, "q_lora_rank", "5"),
}


@pytest.fixture(scope="module")
def found(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    table = {name: row[:2] for name, row in REFUSED.items()}
    return outcomes(demo_model, table, tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(found: dict[str, list[str]], case: str) -> None:
    check_refused(found[case], *REFUSED[case][2:])
