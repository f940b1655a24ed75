"""Read long prompts of requests with a seed on a CPU.

Symptom: a request with `seed` and a temperature above 0 whose prompt is longer than a step's token budget ends the
    engine on a CPU: `CPU Generator does not use offset`.
Cause: the runner draws a token for every request of a step, also for one whose prompt goes on, drops that token and
    sets the request's generator back by the offset that a GPU's generator has and a CPU's has not.
Upstream: not reported yet.
Remove when: the CPU runner sets the generator back by its state, or draws from none.

It differs only where the original raises, and is applied in the workers of our model alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def apply() -> None:
    """Let a token that is dropped be drawn from no request's generator. Called in a worker on a CPU. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    if hasattr(Runner._sample, "keeps_kimi_linear"):
        return
    sample: Callable = Runner._sample
    bookkeeping: Callable = Runner._bookkeeping_sync

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        dropped = np.flatnonzero(self.discard_request_mask.np[: batch.num_reqs]).tolist()
        self.generators_of_dropped = {row: batch.generators.pop(row) for row in dropped if row in batch.generators}
        return sample(self, *args, **kwargs)

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(self.generators_of_dropped)

    vars(_sample)["keeps_kimi_linear"] = True
    Runner._sample = _sample
    Runner._bookkeeping_sync = _bookkeeping_sync
