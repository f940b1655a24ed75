"""A request that steps leave out comes back with the tokens that it had accepted."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.unscheduled_drafts import keep_accepted


class Runner:
    """As vLLM's first runner: who is left out leaves the batch, and comes back with one accepted token."""

    def __init__(self, architecture: str = ARCHITECTURE, drafts: bool = True) -> None:
        self.speculative_config = object() if drafts else None
        self.model_config = SimpleNamespace(architecture=architecture)
        self.input_batch = SimpleNamespace(req_id_to_index={}, num_accepted_tokens_cpu=np.ones(4, np.int32))

    def _update_states(self, output: Any) -> None:
        batch = self.input_batch
        before = {request: batch.num_accepted_tokens_cpu[row] for request, row in batch.req_id_to_index.items()}
        batch.req_id_to_index = {request: row for row, request in enumerate(output.num_scheduled_tokens)}
        for request, row in batch.req_id_to_index.items():
            anew = request in output.scheduled_cached_reqs.resumed_req_ids
            batch.num_accepted_tokens_cpu[row] = 1 if anew else before.get(request, 1)


def step(
    runner: Runner, requests: str, accepted: int, finished: str = "", preempted: str = "", resumed: str = ""
) -> dict[str, int]:
    """Accepted tokens of each request when the step begins; in it each accepts so many."""
    output = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(requests, 1),
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted) or None,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
    )
    keep_accepted(Runner._update_states)(runner, output)
    batch = runner.input_batch
    found = {request: int(batch.num_accepted_tokens_cpu[row]) for request, row in batch.req_id_to_index.items()}
    batch.num_accepted_tokens_cpu[: len(found)] = accepted
    return found


def test_who_is_left_out_keeps_its_number() -> None:
    runner = Runner()
    assert step(runner, "abc", 3) == {"a": 1, "b": 1, "c": 1}
    assert step(runner, "ca", 2) == {"c": 3, "a": 3}
    assert step(runner, "c", 1) == {"c": 2}
    assert step(runner, "bca", 1) == {"b": 3, "c": 1, "a": 2}


def test_who_begins_anew_does_not() -> None:
    runner = Runner()
    step(runner, "abcd", 3)
    step(runner, "a", 3, finished="b", preempted="c")
    assert step(runner, "abcd", 3, resumed="d") == {"a": 3, "b": 1, "c": 1, "d": 1}


def test_other_models_and_steps_without_drafts_are_vllms_own() -> None:
    for runner in (Runner(architecture="Another"), Runner(drafts=False)):
        step(runner, "ab", 3)
        step(runner, "a", 3)
        assert step(runner, "ab", 3) == {"a": 3, "b": 1}
        assert not hasattr(runner, "kda_accepted_tokens")
