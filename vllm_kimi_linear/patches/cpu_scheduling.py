"""Keep the configured chunked prefill, prefix caching, token budget and block size on a CPU."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def keep_what_was_configured(original: Function) -> Function:
    def check_and_update_config(cls: Any, vllm_config: Any) -> Any:
        model_config = vllm_config.model_config
        if model_config is None or model_config.architecture != ARCHITECTURE:
            return original(cls, vllm_config)
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        kept = [
            (cache, "enable_prefix_caching"),
            (cache, "block_size"),
            (cache, "user_specified_block_size"),
            (cache, "mamba_ssm_cache_dtype"),
            (scheduler, "enable_chunked_prefill"),
            (scheduler, "max_num_batched_tokens"),
        ]
        values = [getattr(owner, name) for owner, name in kept]
        cache.user_specified_block_size = False  # else it warns of the size that is put back below
        original(cls, vllm_config)
        for (owner, name), value in zip(kept, values, strict=True):
            if value is not None:
                setattr(owner, name, value)

    return check_and_update_config


PATCH = Patch(
    symptom="On a CPU an MLA model runs without chunked prefill and prefix caching and reserves memory for one "
    "batch of the whole context (a million tokens). Prefix hits give wrong tokens, because the block size falls "
    "back from the hybrid model's aligned one to 16 when the engine runs its configuration again.",
    cause="`CpuPlatform.check_and_update_config` sets these four for every MLA model as if it ran on vLLM's own CPU "
    "backend, whatever backend the model brings. For the block size it is not idempotent.",
    upstream="vllm-project/vllm#54076 concerns the block size that the scheduler reads.",
    remove_when="the CPU platform asks the model's backend what it supports.",
    device="cpu",
    hooks=(
        Hook("vllm.platforms.cpu:CpuPlatform.check_and_update_config", "cls vllm_config", keep_what_was_configured),
    ),
)
