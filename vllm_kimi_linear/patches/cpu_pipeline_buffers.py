"""Give the later stages of a pipeline buffers for the hidden states that they receive, on a CPU."""

from typing import Any

from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def make_buffers(original: Function) -> Function:
    def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    return sync_and_gather_intermediate_tensors


PATCH = Patch(
    symptom="With --pipeline-parallel-size on a CPU the first request ends the engine with an AssertionError in "
    "`sync_and_gather_intermediate_tensors`.",
    cause="The model runner makes the buffers in its profiling run, which the CPU runner skips when nothing is "
    "compiled.",
    remove_when="the CPU runner makes them itself.",
    device="cpu",
    scope="process",
    hooks=(
        Hook(
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sync_and_gather_intermediate_tensors",
            "self ...",
            make_buffers,
        ),
    ),
)
