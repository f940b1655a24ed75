"""How the weights of public checkpoints of the 48B are stored, to plan a model as if it were stored so."""

from collections.abc import Mapping
from typing import Any

from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.quantization import FIELD, LINEAR

FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
FP8_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False} | {
    "strategy": "group",
    "group_size": 32,
}
ATTENTION = "re:.*self_attn.*"
BUT_EXPERTS = ["lm_head", ATTENTION, "re:.*shared_experts.*", r"re:.*\.mlp\..*"]


def compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, ignore: list[str]) -> Any:
    """A `quantization_config` of compressed-tensors with one group; layers that `ignore` names are stored plain."""
    group = {"targets": [LINEAR], "weights": weights, "input_activations": inputs, "format": form}
    common = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return common | {"config_groups": {"group_0": group}, "ignore": ignore}


# Best first: all linear layers by channel; the experts in groups of 32.
STORED = {
    "fp8": compressed(
        "float-quantized", FP8_WEIGHTS | {"strategy": "channel"}, FP8_INPUTS | {"strategy": "token"}, ["lm_head"]
    ),
    "int4": compressed("pack-quantized", INT4_WEIGHTS, None, BUT_EXPERTS),
}
# Of these vLLM makes from a plain checkpoint on a GPU what its --quantization calls so.
WHILE_LOADING = {"fp8": "fp8_per_channel"}
GUIDE = "docs/guide/quantised-checkpoints.md"  # says where to get the others
# The least compute capability of a GPU that vLLM multiplies them on.
CAPABILITIES = {"fp8": (8, 9), "int4": (8, 0)}


def as_stored(config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The config of the same model with weights as `STORED` has them; raises ConfigError for one that is quantised."""
    if config.get(FIELD):
        raise ConfigError(f"--weights is {weights}, and MODEL has a {FIELD} of its own; leave --weights out")
    return {**config, FIELD: STORED[weights]}
