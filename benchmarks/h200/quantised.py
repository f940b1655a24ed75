"""How a checkpoint's weights are stored: what public ones of the 48B have in config.json (docs/guide)."""

from typing import Any

from kimi_server.planner.stored import ATTENTION, FP8_INPUTS, FP8_WEIGHTS, STORED, compressed

WEIGHTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    **STORED,
    "fp8-block": compressed(
        "float-quantized",
        FP8_WEIGHTS | {"strategy": "block", "block_structure": [128, 128]},
        FP8_INPUTS | {"strategy": "group", "group_size": 128},
        ["lm_head", ATTENTION],
    ),
}


def quantised(weights: str) -> dict[str, Any]:
    """What config.json has for these."""
    found = WEIGHTS[weights]
    return {} if found is None else {"quantization_config": found}
