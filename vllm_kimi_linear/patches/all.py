"""Every patch of vLLM."""

from importlib import import_module

from vllm.platforms import current_platform

from vllm_kimi_linear.patches.patch import Patch
from vllm_kimi_linear.supported import versions

MODULES = (
    "patches.process_model",
    "patches.chunk_ends",
    "patches.state_checkpoints",
    "patches.unpadded_prompts",
    "patches.checkpoint_metrics",
    "patches.first_faults",
    "patches.cache_size_log",
    "patches.cache_too_small",
    "patches.cpu_scheduling",
    "patches.cpu_spec_decode",
    "patches.cpu_draft_states",
    "patches.cpu_draft_threads",
    "patches.unscheduled_drafts",
    "patches.cpu_seeds",
    "patches.cpu_pipeline_buffers",
    "patches.cpu_polling",
    "patches.old_tokenizer",
    "patches.cpu_adapters",
    "patches.adapter_shapes",
    "patches.adapter_faults",
    "patches.offloaded_files",
    "patches.checked_transfers",
    # Speed-ups, beside what they speed up.
    "cache.steady_requests",
    "attention.mla_splits",
    "steady_steps",
    "fused_moe_configs",
)


def patches() -> dict[str, Patch]:
    """Name of each module, in this package -> its patch."""
    return {name: import_module(f"vllm_kimi_linear.{name}").PATCH for name in MODULES}


def apply() -> None:
    """Put every patch of this machine and this vLLM in its place. Idempotent."""
    series = versions.series()
    for patch in patches().values():
        if patch.device in ("any", current_platform.device_type) and series in patch.versions:
            patch.apply()
