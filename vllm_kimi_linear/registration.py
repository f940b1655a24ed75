"""Hand vLLM what is ours: the model, its checks, the backend and the cache of its KDA layers, and the patches."""

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.cache.manager import KdaManager
from vllm_kimi_linear.cache.spec import KdaSpec
from vllm_kimi_linear.config.hf import CheckedConfig
from vllm_kimi_linear.patches import all as patches
from vllm_kimi_linear.supported import versions
from vllm_kimi_linear.validation import KimiLinearForCausalLMConfig, OtherImplementationConfig, report_install


def register() -> None:
    """Idempotent."""
    report_install()
    MODELS_CONFIG_MAP[ARCHITECTURE] = KimiLinearForCausalLMConfig
    for other in OtherImplementationConfig.ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(other, OtherImplementationConfig)
    _CONFIG_REGISTRY["kimi_linear"] = CheckedConfig
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_kimi_linear.model:{ARCHITECTURE}")
    register_backend(
        MambaAttentionBackendEnum.CUSTOM, "vllm_kimi_linear.attention.kda_metadata.KdaBackend", is_mamba=True
    )
    KVCacheSpecRegistry._ensure_registered()  # else registering ours first would keep vLLM's own from being registered
    KVCacheSpecRegistry.register(KdaSpec, KdaManager, MambaSpec)
    if versions.is_known():
        patches.apply()
