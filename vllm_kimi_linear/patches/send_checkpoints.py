"""Send which states a step keeps from the scheduler to the builders of the KDA layers' metadata.

Symptom: with drafts a prompt read in several chunks ends the engine on a CPU (`exports.slots holds 2 twice`), and on a
    GPU overwrites the running state with an earlier one: a worker took every column of its block table that names a
    block for a state to keep, and columns that held drafts before a chunk go on to name their blocks.
Cause: `SchedulerOutput` has no field for states inside a chunk but at vLLM's own one place
    (`MambaPrefillCheckpointMetadata`), and a worker's block table only grows.
Upstream: not reported yet.
Remove when: a layer can say where in a chunk it keeps states (more than `num_prefill_checkpoint_blocks` = 1).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kimi_linear import snapshots
from vllm_kimi_linear.checkpoints import StateCheckpoints

FIELD = "kda_checkpoints"  # of SchedulerOutput: request -> StateCheckpoints


def apply() -> None:
    """Idempotent. Does nothing in an engine without KDA layers of ours."""
    if hasattr(SchedulerOutput, FIELD):
        return
    setattr(SchedulerOutput, FIELD, {})  # of a step that no scheduler made, as a warm-up's
    _send()
    _receive()


def _send() -> None:
    original: Callable = Scheduler.schedule

    @functools.wraps(original)
    def schedule(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if managers := snapshots.kda_managers(self.kv_cache_manager.coordinator):
            setattr(output, FIELD, snapshots.take_checkpoints(managers))
        return output

    Scheduler.schedule = schedule


def _receive() -> None:
    """Both runners put the batch in its order and then prepare its inputs."""
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        prepare_on_gpu: Callable = GPUModelRunner.prepare_inputs

        @functools.wraps(prepare_on_gpu)
        def prepare_inputs(self, scheduler_output, *args, **kwargs):
            batch = prepare_on_gpu(self, scheduler_output, *args, **kwargs)
            hand_out(self, scheduler_output, batch.req_ids)
            return batch

        GPUModelRunner.prepare_inputs = prepare_inputs
    else:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        prepare_on_cpu: Callable = CPUModelRunner._prepare_inputs

        @functools.wraps(prepare_on_cpu)
        def _prepare_inputs(self, scheduler_output, *args, **kwargs):
            hand_out(self, scheduler_output, self.input_batch.req_ids)
            return prepare_on_cpu(self, scheduler_output, *args, **kwargs)

        CPUModelRunner._prepare_inputs = _prepare_inputs


def hand_out(runner: Any, scheduler_output: SchedulerOutput, request_ids: Sequence[str]) -> None:
    """Give each builder of KDA metadata the step's states in the order of the batch."""
    from vllm_kimi_linear.metadata import KdaMetadataBuilder

    sent: dict[str, StateCheckpoints] = getattr(scheduler_output, FIELD)
    checkpoints = [sent.get(request_id) for request_id in request_ids]
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.get_metadata_builder(0)
        if isinstance(builder, KdaMetadataBuilder):
            builder.keep_states(group.kv_cache_group_id, checkpoints)
