"""Remember how many drafts a request had accepted while a step leaves the request out."""

from itertools import chain
from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

KEPT = "kda_accepted_tokens"  # of the runner: request -> accepted tokens of its last step, while it is left out


def keep_accepted(original: Function) -> Function:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        if self.speculative_config is None or self.model_config.architecture != ARCHITECTURE:
            return original(self, scheduler_output)
        kept: dict[str, int] = vars(self).setdefault(KEPT, {})
        batch, scheduled = self.input_batch, scheduler_output.num_scheduled_tokens
        for request, row in batch.req_id_to_index.items():
            if request not in scheduled:
                kept[request] = int(batch.num_accepted_tokens_cpu[row])
        begins_anew = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for request in chain(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or (), begins_anew):
            kept.pop(request, None)
        result = original(self, scheduler_output)
        for request in kept.keys() & scheduled.keys():
            batch.num_accepted_tokens_cpu[batch.req_id_to_index[request]] = kept.pop(request)
        return result

    return _update_states


PATCH = Patch(
    symptom="With --speculative-config on a CPU an answer goes wrong if it had accepted drafts and the next step "
    "had no room for it, because long prompts took the step's tokens.",
    cause="When a step leaves a request out, vLLM's first model runner removes it from the batch, and later adds it "
    "again with one accepted token (`InputBatch.add_request`). It then continues from a state that is some tokens "
    "too old.",
    remove_when="`CachedRequestState` keeps the number, or the first runner is gone.",
    hooks=(
        Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states", "self scheduler_output", keep_accepted),
    ),
)
