"""What is checked and said when a server starts: the config, the cache dtypes, the implementation in use.

vLLM consults `MODELS_CONFIG_MAP` by architecture while it builds its configuration, before any weight is
read: the earliest place where the model's config, the parallelism and the cache flags are all known.
"""

import torch
import transformers
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config

from kda_kernels import interface
from vllm_kimi_linear import ARCHITECTURE, __version__
from vllm_kimi_linear.adapters.names import TARGETS
from vllm_kimi_linear.cache import configured
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.flags import check_block_size, check_flags
from vllm_kimi_linear.config.model import ModelSizes, check_cache_dtypes, check_device
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches.patch import serve_ours
from vllm_kimi_linear.supported import install_check, versions


class KimiLinearForCausalLMConfig(VerifyAndUpdateConfig):
    """Stops the start, in one sentence, of anything we cannot run or would have to ignore."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        sizes = configured.model_sizes(vllm_config)
        cache, device = vllm_config.cache_config, current_platform.device_type
        if not versions.is_known():
            cache.enable_prefix_caching = False
            logger.warning_once("Kimi Linear: %s.", versions.unsupported())
        else:
            serve_ours()
        check_device(sizes, device)
        check_cache_dtypes(cache.cache_dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype, device)
        check_flags(vllm_config, states=bool(sizes.kda_layers))
        if vllm_config.lora_config is not None:
            vllm_config.lora_config.target_modules = list(TARGETS)  # else vLLM would wrap what takes no adapter, too
        check_tokenizer(vllm_config.model_config)
        if sizes.kda_layers:
            # From here on as if the user had chosen it: vLLM would take a block that holds a state in each MLA layer.
            cache.block_size = configured.cache_layout(vllm_config, 0).block_tokens
            cache.user_specified_block_size = True
            if cache.enable_prefix_caching:
                check_block_size(cache.block_size, device)
                # A state's block spans what all ranks' blocks of latents do: else vLLM would match prefixes inside one.
                cache.mamba_block_size = cache.block_size * vllm_config.parallel_config.decode_context_parallel_size


class OtherImplementationConfig(VerifyAndUpdateConfig):
    """Stops the start of this model by an implementation of Transformers'; other models pass."""

    # What vLLM calls the implementation that --model-impl=transformers chooses, without experts and with them.
    ARCHITECTURES = ("TransformersForCausalLM", "TransformersMoEForCausalLM")

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if ARCHITECTURE in model_config.architectures:
            raise ConfigError(
                f"--model-impl is {model_config.model_impl}; this model has an implementation of its own, leave it out"
            )


def check_tokenizer(model: ModelConfig) -> None:
    """Raises ConfigError if the checkpoint's tokenizer, often code of its own, does not load; vLLM keeps it."""
    if model.skip_tokenizer_init:
        return
    try:
        cached_tokenizer_from_config(model)
    except Exception as error:  # the code is the checkpoint's: it may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"the tokenizer of {model.tokenizer} does not load with transformers {transformers.__version__}; "
            f"choose one made for that version with --tokenizer or --tokenizer-revision ({reason})"
        ) from error


def report_install() -> None:
    """Log one sentence for each fault of the installed environment, naming the command that mends it."""
    for problem in install_check.problems():
        logger.warning_once("%s", problem)


def log_implementation(vllm_config: VllmConfig, sizes: ModelSizes, state: torch.dtype) -> None:
    """One line: whose implementation serves, with which kernels, and why not faster ones."""
    name, reason = interface.describe(
        current_platform.device_type, vllm_config.model_config.dtype, sizes.kda_head_dim, state
    )
    logger.info_once("Kimi Linear by vllm-kimi-linear %s: KDA kernels %s (%s)", __version__, name, reason)
