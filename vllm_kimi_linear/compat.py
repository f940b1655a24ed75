"""Every patch of vLLM, each with its symptom, its cause, and when it goes away."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

from vllm_kimi_linear import ARCHITECTURE, snapshots, start_checks, vllm_version
from vllm_kimi_linear.config_error import ConfigError
from vllm_kimi_linear.patches import (
    cpu_seeds,
    cpu_spec_decode,
    first_faults,
    send_checkpoints,
    snapshots_shown,
    unpadded_prompts,
)

logger = init_logger("vllm.kimi_linear")  # under "vllm", so that its handlers apply

POLL_SECONDS = 1e-4
WIDE = 4  # times as many parts of a context as vLLM's default, where few sequences decode
FEW = 8  # tokens of a step that count as few, however small the largest graph is


def apply() -> None:
    """Register our KDA backend and cache, and apply the patches that are made for this version of vLLM. Idempotent."""
    register_backend(MambaAttentionBackendEnum.CUSTOM, "vllm_kimi_linear.metadata.KdaBackend", is_mamba=True)
    snapshots.register()
    if vllm_version.is_known():
        end_chunks_at_blocks()
        send_checkpoints.apply()
        ask_groups_once_a_block()
        count_snapshots()
        snapshots_shown.apply()
        say_what_fits()
        say_what_is_short()
        keep_scheduling_on_cpu()
        split_contexts_of_few()
        keep_draft_states_on_cpu()
        cpu_spec_decode.apply()
        unpadded_prompts.apply()
        first_faults.apply()


def keep_scheduling_on_cpu() -> None:
    """Keep chunked prefill, prefix caching, the token budget and the block size that were configured.

    Symptom: on a CPU an MLA model runs without chunked prefill and prefix caching and prepares for one batch
        of the whole context (a million tokens); warm prefix hits give wrong tokens, because the block size
        falls back from the hybrid model's aligned one to 16 when the engine re-runs its configuration.
    Cause: `CpuPlatform.check_and_update_config` sets these four for every MLA model on its own reference
        backend, whatever backend the model brings, and is not idempotent for the block size.
    Upstream: vllm-project/vllm#54076 concerns the block size that the scheduler reads.
    Remove when: the CPU platform asks the model's backend what it supports.
    """
    from vllm.platforms.cpu import CpuPlatform

    original: Callable = CpuPlatform.check_and_update_config.__func__
    if getattr(original, "keeps_kimi_linear", False):
        return

    @functools.wraps(original)
    def check_and_update_config(cls, vllm_config):
        model_config = vllm_config.model_config
        if model_config is None or model_config.architecture != ARCHITECTURE:
            return original(cls, vllm_config)
        sleep_between_polls_on_cpu()  # this may be the engine's process, which reads what its workers answer
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

    vars(check_and_update_config)["keeps_kimi_linear"] = True
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def end_chunks_at_blocks() -> None:
    """End the chunks of a prompt on the blocks of the KDA layers, and nowhere else for the sake of the prefix cache.

    Symptom: warm prefix hits give wrong tokens where another group of layers has smaller blocks; and a prompt is
        read in extra steps that end at its last block boundary and where it was seen to leave a shared prefix.
    Cause: `Scheduler._mamba_block_aligned_split` cuts by the smallest block size of all groups, and knows no layer
        that writes states inside a chunk but at one place. Ours writes them wherever its manager put a block.
    Upstream: vllm-project/vllm#54076 concerns the block size.
    Remove when: the scheduler cuts by the group's own block size and lets a layer say where it keeps states.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    original: Callable = Scheduler._mamba_block_aligned_split
    if getattr(original, "keeps_kimi_linear", False):
        return

    @functools.wraps(original)
    def split(self, request, num_new_tokens, num_new_local_computed_tokens=0, num_external_computed_tokens=0):
        managers = snapshots.kda_managers(self.kv_cache_manager.coordinator)
        if not managers:
            return original(self, request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens)
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        prefill_end = max(request.num_prompt_tokens, request.num_tokens - 1)
        block, end = managers[0].block_size, start + num_new_tokens
        if start >= prefill_end:
            snapshots.plan(managers, request, start, start)
            return num_new_tokens
        if start % block:  # a block larger than a step: go on to its end
            end = min(end, (start // block + 1) * block)
        elif end < prefill_end and end // block * block > start:
            end = end // block * block
        snapshots.plan(managers, request, start, end)
        return end - start

    vars(split)["keeps_kimi_linear"] = True
    Scheduler._mamba_block_aligned_split = split


def ask_groups_once_a_block() -> None:
    """Ask the groups of layers nothing about a request that goes on inside its blocks.

    Symptom: with 21 groups (48B, one rank) the scheduler takes 5 times as long a step as with 4, 6 ms for 64
        sequences (`benchmarks/cache_blocks.py`).
    Cause: for every request `KVCacheCoordinator` asks each group's manager four times a step, though their answer
        changes when the request enters a block.
    Upstream: not reported yet.
    Remove when: the coordinator asks once for groups of one kind.
    """
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator as Coordinator

    if hasattr(Coordinator.cache_blocks, "keeps_kimi_linear"):
        return
    originals: dict[str, Callable] = {
        name: getattr(Coordinator, name)
        for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "remove_skipped_blocks", "cache_blocks")
    }

    def settled(coordinator: Any, request_id: str) -> int:
        managers = snapshots.kda_managers(coordinator)
        return managers[0].settled.get(request_id, 0) if managers else 0

    @functools.wraps(originals["get_num_blocks_to_allocate"])
    def get_num_blocks_to_allocate(self, request_id, num_tokens, *args, **kwargs):
        if num_tokens <= settled(self, request_id):
            return 0
        return originals["get_num_blocks_to_allocate"](self, request_id, num_tokens, *args, **kwargs)

    @functools.wraps(originals["allocate_new_blocks"])
    def allocate_new_blocks(self, request_id, num_tokens, *args, **kwargs):
        if num_tokens <= settled(self, request_id):
            return tuple([] for _ in self.single_type_managers)
        return originals["allocate_new_blocks"](self, request_id, num_tokens, *args, **kwargs)

    @functools.wraps(originals["remove_skipped_blocks"])
    def remove_skipped_blocks(self, request_id, processed_computed_tokens, *args, **kwargs):
        if processed_computed_tokens > settled(self, request_id):
            originals["remove_skipped_blocks"](self, request_id, processed_computed_tokens, *args, **kwargs)

    @functools.wraps(originals["cache_blocks"])
    def cache_blocks(self, request, num_computed_tokens):
        if num_computed_tokens >= settled(self, request.request_id):
            originals["cache_blocks"](self, request, num_computed_tokens)
            if managers := snapshots.kda_managers(self):
                snapshots.settle(managers, request.request_id)

    vars(cache_blocks)["keeps_kimi_linear"] = True
    for patch in (get_num_blocks_to_allocate, allocate_new_blocks, remove_skipped_blocks, cache_blocks):
        setattr(Coordinator, patch.__name__, patch)


def count_snapshots() -> None:
    """Send the numbers of `snapshot_metrics.py` from the engine to the process that answers /metrics.

    Symptom: nothing tells how many states of KDA layers the prefix cache holds, nor how many it lost.
    Cause: `SchedulerStats` has no field for what a plugin counts, and other fields do not pass between the processes.
        They travel in that of waiting LoRA adapters, which nothing reads without LoRA, which this model refuses.
    Upstream: not reported yet.
    Remove when: a plugin can add to the scheduler's statistics.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    original: Callable = Scheduler.make_stats
    if hasattr(original, "keeps_kimi_linear"):
        return

    @functools.wraps(original)
    def make_stats(self, *args, **kwargs):
        stats = original(self, *args, **kwargs)
        managers = snapshots.kda_managers(self.kv_cache_manager.coordinator)
        if stats is not None and managers and managers[0].count is not None:
            stats.waiting_lora_adapters.update(managers[0].count.take())
        return stats

    vars(make_stats)["keeps_kimi_linear"] = True
    Scheduler.make_stats = make_stats


def say_what_fits() -> None:
    """Log how many sequences fit, and what each takes, where vLLM logs a number of tokens.

    Symptom: "KV cache size: 16,273,515 tokens" for a cache of which most is one state a sequence (vllm#28228).
    Cause: `update_kv_cache_capacity` multiplies the number of sequences of the full length by that length.
    Upstream: vllm-project/vllm#28228.
    Remove when: vLLM says how many sequences fit and what a token and a sequence take.
    """
    engine: Any = sys.modules.get("vllm.v1.engine.core")  # present in the engine's process alone, which logs
    if engine is None or hasattr(engine.update_kv_cache_capacity, "keeps_kimi_linear"):
        return
    original: Callable = engine.update_kv_cache_capacity

    @functools.wraps(original)
    def update_kv_cache_capacity(vllm_config, kv_cache_config):
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if model.architecture != ARCHITECTURE or parallel.pipeline_parallel_size > 1:
            return original(vllm_config, kv_cache_config)
        cache = vllm_config.cache_config
        cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency = get_kv_cache_capacity(vllm_config, kv_cache_config)
        plan = start_checks.plan(vllm_config, kv_cache_config.num_blocks)
        logger.info("Kimi Linear: %s", plan.describe(model.max_model_len))

    vars(update_kv_cache_capacity)["keeps_kimi_linear"] = True
    engine.update_kv_cache_capacity = update_kv_cache_capacity


def say_what_is_short() -> None:
    """Refuse a length that the cache can never hold in one sentence, with the bytes and the length that would fit.

    Symptom: "To serve at least one request with the model's max seq len (1048576), (4.5 GiB KV cache is needed, which
        is larger than the available KV cache memory (0.06 GiB).", and four more sentences.
    Cause: `get_kv_cache_configs` knows neither which flag set the size nor that we name flags.
    Upstream: not reported.
    Remove when: vLLM names the flags, and what is missing.
    """
    engine: Any = sys.modules.get("vllm.v1.engine.core")
    if engine is None or hasattr(engine.get_kv_cache_configs, "keeps_kimi_linear"):
        return
    original: Callable = engine.get_kv_cache_configs

    @functools.wraps(original)
    def get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory):
        try:
            return original(vllm_config, kv_cache_specs, available_memory)
        except ValueError:
            if vllm_config.model_config.architecture != ARCHITECTURE:
                raise
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise
            raise ConfigError(start_checks.what_is_short(vllm_config, min(available_memory))) from None

    vars(get_kv_cache_configs)["keeps_kimi_linear"] = True
    engine.get_kv_cache_configs = get_kv_cache_configs


def split_contexts_of_few() -> None:
    """Let the latent attention of a few long sequences use the whole GPU.

    Symptom: one sequence of a million tokens decodes at a third of the memory's bandwidth (`docs/gpu.md`).
    Cause: in a CUDA graph FLASH_ATTN_MLA cuts a sequence into at most 32 parts, one for each multiprocessor, of which
        a Hopper has 132. The bound is there for the buffers of partial results, which grow with it and with the
        tokens of the step: a quarter of the largest graph's tokens can have four times the parts in the same bytes.
    Upstream: vllm-project/vllm#35899, closed, did so for all sizes of a graph.
    Remove when: the bound depends on the size of the graph.

    A value of `--attention-config.flash_attn_max_num_splits_for_cuda_graph` that is not the default stands.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLAMetadataBuilder as Builder

    original: Callable = Builder._build_decode
    if hasattr(original, "keeps_kimi_linear"):
        return
    default = AttentionConfig.flash_attn_max_num_splits_for_cuda_graph

    @functools.wraps(original)
    def build_decode(self, *, num_decode_tokens, **kwargs):
        config = self.vllm_config
        if (
            config.model_config.architecture == ARCHITECTURE
            and config.attention_config.flash_attn_max_num_splits_for_cuda_graph == default
            and self.max_num_splits >= default  # else graphs are off, or batches invariant
        ):
            few = few_tokens(tuple(config.compilation_config.cudagraph_capture_sizes))
            self.max_num_splits = default * (WIDE if num_decode_tokens <= few else 1)
        return original(self, num_decode_tokens=num_decode_tokens, **kwargs)

    vars(build_decode)["keeps_kimi_linear"] = True
    Builder._build_decode = build_decode


@functools.cache  # asked in every step
def few_tokens(graphs: tuple[int, ...]) -> int:
    """The largest graph's tokens, of these, that count as few: a step and the graph that it is padded to agree."""
    bound = max([FEW, *(size // WIDE for size in graphs)])
    return max((size for size in graphs if size <= bound), default=0)


def sleep_between_polls_on_cpu() -> None:
    """Leave the cores to the threads that compute while a process waits for another's message. Called in the processes
    of this model.

    Symptom: on a machine of few cores decoding is a third slower than its matrix products.
    Cause: a reader of the shared-memory queue polls without a pause for a second after each message, so that in
        steady decoding the engine's process takes a core from the worker's threads all the time.
    Upstream: vllm-project/vllm#52848 and #52814 make the wait configurable; #52916 would make it adaptive.
    Remove when: one of these has landed; set its variable in its place.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    if vllm_version.is_known():
        shm_broadcast.sched_yield = functools.partial(time.sleep, POLL_SECONDS)


def keep_draft_states_on_cpu() -> None:
    """Let drafts be verified with prefix caching where no Triton kernel runs.

    Symptom: with --speculative-config and prefix caching on a CPU the first step ends the engine: the kernels that
        copy states at block boundaries are not callable.
    Cause: `MambaSpecDecodeGPUContext` launches Triton kernels, for which vLLM has no CPU version.
    Upstream: not reported yet.
    Remove when: `vllm.utils.cpu_triton_utils` has them.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

    from vllm_kimi_linear.cpu import draft_states

    if current_platform.is_cpu():
        MambaSpecDecodeGPUContext.run_fused_postprocess = draft_states.keep_at_block_ends
        MambaSpecDecodeGPUContext.run_fused_precopy = draft_states.move_to_new_block


def mend_cpu_runner() -> None:
    """Apply what patches the CPU's model runner. Called in the worker, where it is imported anyway. Idempotent."""
    if vllm_version.is_known():
        sleep_between_polls_on_cpu()
        cpu_seeds.apply()


def make_pipeline_buffers_on_cpu() -> None:
    """Give the later stages of a pipeline the buffers they receive hidden states in. Called in the worker. Idempotent.

    Symptom: with --pipeline-parallel-size on a CPU the first request ends the engine with an AssertionError in
        `sync_and_gather_intermediate_tensors`.
    Cause: the model runner makes the buffers in its profiling run, which the CPU runner leaves out when nothing
        is compiled.
    Upstream: not reported yet.
    Remove when: the CPU runner makes them itself.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    name = "sync_and_gather_intermediate_tensors"
    if name in vars(CPUModelRunner) or not vllm_version.is_known():
        return
    original = getattr(CPUModelRunner, name)

    @functools.wraps(original)
    def sync_and_gather_intermediate_tensors(self, *args, **kwargs):
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    setattr(CPUModelRunner, name, sync_and_gather_intermediate_tensors)
