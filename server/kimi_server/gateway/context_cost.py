"""The memory that a context takes, for the playground's bar."""

import json
from dataclasses import dataclass
from pathlib import Path

from kimi_server.gateway.config.yaml_file import SettingsError
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes


@dataclass(frozen=True)
class ContextCost:
    kda_state_bytes: int  # of a sequence, whatever its length
    mla_bytes_per_token: int


def read_cost(path: Path) -> ContextCost:
    """The cost on one rank for the config.json at `path`; raises SettingsError."""
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ConfigError("it holds no object; name a checkpoint's config.json")
        model_sizes = ModelSizes.from_config(config)
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        if not isinstance(dtype, str) or dtype not in tensors.DTYPE_BYTES:
            raise SettingsError(
                f"model_config {path}: dtype is {dtype!r}: use one of {', '.join(tensors.DTYPE_BYTES)}."
            )
        plan = layout.cache_layout(model_sizes, activation_dtype=dtype, kv_bytes=0)
    # TypeError: a list where the config has a number, and the like. OverflowError: sizes beyond a float.
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, ConfigError) as error:
        raise SettingsError(f"model_config {path} cannot be used: {error}") from None
    return ContextCost(plan.kda_state_bytes_per_sequence, plan.mla_bytes_per_token)
