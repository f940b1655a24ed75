"""End the chunks of a prompt on block boundaries of the KDA layers, and decide there which states a chunk keeps."""

from typing import Any

from vllm_kimi_linear.cache import manager as kda
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def split_at_kda_blocks(original: Function) -> Function:
    def split(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> Any:
        managers = kda.kda_managers(self.kv_cache_manager.coordinator)
        if not managers:
            return original(self, request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens)
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        prefill_end = max(request.num_prompt_tokens, request.num_tokens - 1)
        block, end = managers[0].block_size, start + num_new_tokens
        if start >= prefill_end:
            kda.plan_checkpoints(managers, request, start, start)
            return num_new_tokens
        if start % block:  # a block larger than a step: go on to its end
            end = min(end, (start // block + 1) * block)
        elif end < prefill_end and end // block * block > start:
            end = end // block * block
        kda.plan_checkpoints(managers, request, start, end)
        return end - start

    return split


PATCH = Patch(
    symptom="Prefix hits give wrong tokens if another group of layers has smaller blocks. And a prompt is read in "
    "extra steps, which end at its last block boundary and where it was seen to leave a shared prefix.",
    cause="`Scheduler._mamba_block_aligned_split` cuts by the smallest block size of all groups, and assumes that a "
    "layer writes at most one state inside a chunk. Our kernel writes one wherever the manager of the cache planned "
    "it.",
    upstream="vllm-project/vllm#54076 concerns the block size.",
    remove_when="the scheduler cuts by the group's own block size and lets a layer say where it keeps states.",
    hooks=(
        Hook(
            "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
            "self request num_new_tokens num_new_local_computed_tokens num_external_computed_tokens",
            split_at_kda_blocks,
        ),
    ),
)
