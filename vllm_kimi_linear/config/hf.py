"""The class vLLM reads config.json into: vLLM's own, after a check of what the file itself says.

vLLM's class fills in defaults of other models for what is missing, and asserts without a word for some of what
is wrong, both before `validation.py` sees anything.
"""

from typing import Any

from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

from vllm_kimi_linear.config.fields import original_keys
from vllm_kimi_linear.config.model import ModelSizes


class CheckedConfig(KimiLinearConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises ConfigError with one sentence for a config.json that does not describe a model we run."""
        ModelSizes.from_config(config_dict)
        return super().from_dict(original_keys(config_dict), **kwargs)
