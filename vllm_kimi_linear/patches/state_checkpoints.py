"""Send the states that a step keeps from the scheduler to the builders of the KDA layers' metadata."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kimi_linear.cache import manager as kda
from vllm_kimi_linear.cache.policy import StateCheckpoints
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

FIELD = "kda_checkpoints"  # of SchedulerOutput: request -> StateCheckpoints; absent in a step of a warm-up


def send(original: Function) -> Function:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if managers := kda.kda_managers(self.kv_cache_manager.coordinator):
            setattr(output, FIELD, kda.take_checkpoints(managers))
        return output

    return schedule


def receive_on_gpu(original: Function) -> Function:
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        hand_out(self, scheduler_output, batch.req_ids)
        return batch

    return prepare_inputs


def receive_on_cpu(original: Function) -> Function:
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        hand_out(self, scheduler_output, self.input_batch.req_ids)
        return original(self, scheduler_output, *args, **kwargs)

    return _prepare_inputs


def hand_out(runner: Any, scheduler_output: SchedulerOutput, request_ids: Sequence[str]) -> None:
    """Give each builder of KDA metadata the step's states in the order of the batch."""
    sent: dict[str, StateCheckpoints] | None = getattr(scheduler_output, FIELD, None)
    if sent is None:  # no scheduler with KDA layers made this step
        return
    from vllm_kimi_linear.attention.kda_metadata import KdaMetadataBuilder

    checkpoints = [sent.get(request_id) for request_id in request_ids]
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.get_metadata_builder(0)
        if isinstance(builder, KdaMetadataBuilder):
            builder.keep_states(group.kv_cache_group_id, checkpoints)


PATCH = Patch(
    symptom="Without it a worker can only look for blocks of kept states in its block table, and finds blocks of "
    "earlier drafts there too. With drafts, a prompt read in several chunks then ends the engine on a CPU "
    "(`checkpoints.state_indices holds 2 twice`), and on a GPU overwrites the running state with an earlier one.",
    cause="`SchedulerOutput` has no field for states inside a chunk, except vLLM's own single one "
    "(`MambaPrefillCheckpointMetadata`), and entries of a worker's block table are never removed.",
    remove_when="a layer can say where in a chunk it keeps states (more than `num_prefill_checkpoint_blocks` = 1).",
    hooks=(
        Hook("vllm.v1.core.sched.scheduler:Scheduler.schedule", "self ...", send),
        # Both runners put the batch in its order and then prepare its inputs.
        Hook(
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
            "self scheduler_output ...",
            receive_on_gpu,
        ),
        Hook(
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner._prepare_inputs",
            "self scheduler_output ...",
            receive_on_cpu,
        ),
    ),
)
