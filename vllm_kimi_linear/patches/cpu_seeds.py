"""Read long prompts of requests with a seed on a CPU."""

from typing import Any

import numpy as np

from vllm_kimi_linear.patches.patch import Function, Hook, Patch

RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"


def draw_dropped_from_no_generator(original: Function) -> Function:
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        dropped = np.flatnonzero(self.discard_request_mask.np[: batch.num_reqs]).tolist()
        self.generators_of_dropped = {row: batch.generators.pop(row) for row in dropped if row in batch.generators}
        return original(self, *args, **kwargs)

    return _sample


def give_generators_back(original: Function) -> Function:
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(self.generators_of_dropped)

    return _bookkeeping_sync


PATCH = Patch(
    symptom="A request with `seed` and a temperature above 0 whose prompt is longer than a step's token budget ends "
    "the engine on a CPU: `CPU Generator does not use offset`.",
    cause="The runner draws a token for every request of a step, also for one whose prompt is not read to its end. "
    "It drops that token and resets the request's generator by its offset, which only a GPU's generator has.",
    remove_when="the CPU runner resets the generator by its state, or draws no such token.",
    device="cpu",
    scope="process",
    hooks=(
        Hook(f"{RUNNER}._sample", "self ...", draw_dropped_from_no_generator),
        Hook(f"{RUNNER}._bookkeeping_sync", "self ...", give_generators_back),
    ),
)
