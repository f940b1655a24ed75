"""Start the state of a one-token prompt from zero, also with drafts."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def take_padding_off(original: Function) -> Function:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if drafts and self.vllm_config.model_config.architecture == ARCHITECTURE:
            for request_id in [name for name in drafts if not self.requests[name].num_computed_tokens]:
                padding = len(drafts.pop(request_id))
                scheduler_output.num_scheduled_tokens[request_id] -= padding
                scheduler_output.total_num_scheduled_tokens -= padding
        original(self, scheduler_output)

    return _update_after_schedule


PATCH = Patch(
    symptom="With --speculative-config, a prompt of one token that arrives while others are answered continues from "
    "the state that another request left in its block: the answer is wrong, and reveals what the other was about.",
    cause="`Scheduler.schedule` pads a request that has one token left to compute with placeholders for drafts "
    "(-1), so that the step fits a CUDA graph of decodes. Drafts are verified from a request's state, and this "
    "request has none yet.",
    remove_when="a request without computed tokens is not padded.",
    hooks=(
        Hook(
            "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule", "self scheduler_output", take_padding_off
        ),
    ),
)
