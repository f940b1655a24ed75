"""How a checkpoint's weights are stored: what public ones of the 48B have in config.json (docs/guide)."""

from typing import Any

FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 32}
ATTENTION = "re:.*self_attn.*"
# Name -> (format, weights, activations, layers left in bfloat16)
WEIGHTS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, list[str]] | None] = {
    "bf16": None,
    "fp8": ("float-quantized", FP8 | {"strategy": "channel"}, INPUTS | {"strategy": "token"}, ["lm_head"]),
    "fp8-block": (
        "float-quantized",
        FP8 | {"strategy": "block", "block_structure": [128, 128]},
        INPUTS | {"strategy": "group", "group_size": 128},
        ["lm_head", ATTENTION],
    ),
    "int4": ("pack-quantized", INT4, None, ["lm_head", ATTENTION, "re:.*shared_experts.*", r"re:.*\.mlp\..*"]),
}


def quantised(weights: str) -> dict[str, Any]:
    """What config.json has for these."""
    found = WEIGHTS[weights]
    if found is None:
        return {}
    stored, of_weights, of_inputs, ignore = found
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": of_inputs, "format": stored}
    common = {"quant_method": "compressed-tensors", "format": stored, "quantization_status": "compressed"}
    return {"quantization_config": common | {"config_groups": {"group_0": group}, "ignore": ignore}}
