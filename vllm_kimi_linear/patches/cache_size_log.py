"""Log how many sequences fit, and what each takes, in place of vLLM's number of tokens."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.cache import configured
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def log_sequences(original: Function) -> Function:
    def update_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> Any:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if model.architecture != ARCHITECTURE or parallel.pipeline_parallel_size > 1:
            return original(vllm_config, kv_cache_config)
        from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

        cache = vllm_config.cache_config
        cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency = get_kv_cache_capacity(vllm_config, kv_cache_config)
        layout = configured.cache_layout(vllm_config, kv_cache_config.num_blocks)
        logger.info("Kimi Linear: %s", layout.describe(model.max_model_len))

    return update_kv_cache_capacity


PATCH = Patch(
    symptom='vLLM logs "KV cache size: 16,273,515 tokens" for a cache that mostly holds one state per sequence.',
    cause="`update_kv_cache_capacity` multiplies the number of sequences of full length that fit by that length.",
    upstream="vllm-project/vllm#28228.",
    remove_when="vLLM says how many sequences fit and what a token and a sequence take.",
    hooks=(
        Hook(
            "vllm.v1.engine.core:update_kv_cache_capacity",
            "vllm_config kv_cache_config",
            log_sequences,
        ),
    ),
)
