"""What stands for this model on a vLLM that it is not served with: a refusal where its config.json is read.

Other models go on to work, so little of vLLM is touched: all else of this package may fail to import there.
"""

import contextlib
from typing import Any

from transformers import PretrainedConfig
from vllm.model_executor.models import ModelRegistry

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.supported import versions


class RefusedConfig(PretrainedConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises ConfigError, whatever the file says."""
        raise ConfigError(versions.refusal())


def __getattr__(name: str) -> Any:
    """Refuses the model's class, which vLLM looks up here if it did not read the configuration by the class above."""
    if name == ARCHITECTURE:
        raise ConfigError(versions.refusal())
    raise AttributeError(name)


def register() -> None:
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{ARCHITECTURE}")
    with contextlib.suppress(ImportError):  # the earlier place, but no public one
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        _CONFIG_REGISTRY["kimi_linear"] = RefusedConfig
