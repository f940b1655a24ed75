"""vLLM's scheduler with a cache of this model's kinds, and no engine around it."""

from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec
from vllm.v1.structured_output import StructuredOutputManager

from kimi_demo.presets import demo_config
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.cache.spec import KdaSpec
from vllm_kimi_linear.config.model import ModelSizes

GROUPS = (1, 2, 3)  # of KDA layers; group 0 is the attention layers'


def configuration(model: str, length: int, drafts: int = 0) -> VllmConfig:
    return EngineArgs(
        model,
        dtype="float32",
        max_model_len=length,
        max_num_batched_tokens=4096,
        max_num_seqs=32,
        enable_prefix_caching=True,
        speculative_config={"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
        if drafts
        else None,
    ).create_engine_config()


def scheduler(
    config: VllmConfig, block: int, blocks: int, kind: type[Scheduler] = Scheduler, ranks: int = 1
) -> Scheduler:
    """`block` tokens a block, `blocks` of them; so many ranks share the latents."""
    model_sizes = ModelSizes.from_config(demo_config())
    state = MambaSpec(
        shapes=layout.kda_state_shapes(model_sizes),
        dtypes=(torch.float32, torch.float32),
        block_size=block,
        mamba_cache_mode="align",
        num_speculative_blocks=config.num_speculative_tokens,
    )
    latents = MLAAttentionSpec(
        block_size=block // ranks, num_kv_heads=1, head_size=model_sizes.latent_size, dtype=torch.float32
    )
    plan = layout.cache_layout(
        model_sizes, activation_dtype="float32", kv_bytes=1 << 30, block_tokens=block, prefix_caching=True
    )
    kda: KVCacheSpec = replace(KdaSpec.of(state, config.model_config.max_model_len, plan), groups=len(GROUPS))
    cache = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec(["mla"], latents),
            *(KVCacheGroupSpec([f"kda.{group}"], kda) for group in GROUPS),
        ],
        prefix_cache_retention_interval=0,
    )
    config.cache_config.block_size, config.cache_config.mamba_block_size = block // ranks, block
    config.parallel_config.decode_context_parallel_size = ranks
    config.cache_config.num_gpu_blocks = blocks
    init_none_hash(sha256)
    register_all_kvcache_specs(config)
    return kind(config, cache, StructuredOutputManager(config), block, block)
