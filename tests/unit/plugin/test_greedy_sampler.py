"""Which steps take their likeliest tokens at once, and which go through vLLM's sampler."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from vllm_kimi_linear.greedy_sampler import GreedySampler

ROWS = 4


@pytest.fixture(autouse=True)
def vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits, batch: "vLLM's")


def sampler(temperatures: list[float], **more: Any) -> GreedySampler:
    base = object.__new__(Sampler)
    logprobs = np.full(ROWS, NO_LOGPROBS)
    base.__dict__ = {
        "compute_nans": False,
        "return_sampling_mask": False,
        "trace_replay_state": None,
        "needs_logits_processing": np.zeros(ROWS, bool),
        "sampling_states": SimpleNamespace(
            temperature=SimpleNamespace(np=np.array(temperatures)), max_num_logprobs=lambda rows: logprobs[rows].max()
        ),
        "logprob_token_ids_state": SimpleNamespace(max_num_token_ids=lambda rows: 0),
        "logprobs": logprobs,
    } | more
    ours = GreedySampler.of(base)
    assert ours(LOGITS, batch([0])) == "vLLM's"
    return ours


def batch(rows: list[int], **more: Any) -> Any:
    values = {"has_prefill": False, "num_draft_tokens": 0, "req_ids": [f"request {row}" for row in rows]} | more
    return SimpleNamespace(idx_mapping_np=np.array(rows), num_reqs=len(rows), **values)


LOGITS = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])  # of equals the first


def test_greedy_requests_take_the_likeliest() -> None:
    found = sampler([0.0, 1.0, 0.0, 1.0])(LOGITS, batch([0, 2]))
    assert isinstance(found, SamplerOutput)
    assert found.sampled_token_ids.tolist() == [[1], [0]]
    assert found.num_sampled.tolist() == [1, 1] and found.num_rejected.tolist() == [0, 0]
    assert found.num_sampled.dtype == found.num_rejected.dtype == torch.int32
    assert found.logprobs_tensors is found.num_nans is found.sampling_mask_tensors is None


def test_the_first_call_is_vllms() -> None:
    """Its profile run: it measures the memory of vLLM's sampler, and compiles kernels that a request would wait for."""
    ours = sampler([0.0] * ROWS)
    ours.profiled = False
    assert ours(LOGITS, batch([0, 2])) == "vLLM's"
    assert ours(LOGITS, batch([0, 2])) != "vLLM's"


def test_nothing_lies_among_the_weights() -> None:
    """vLLM makes its sampler while it loads weights; sleep mode takes what lies there, and loads weights alone."""
    base = object.__new__(Sampler)
    base.__dict__ = {}
    ours = GreedySampler.of(base)
    assert not [name for name, value in vars(ours).items() if isinstance(value, torch.Tensor)]


def test_all_else_is_vllms() -> None:
    greedy = [0.0] * ROWS
    assert sampler([0.0, 0.0, 0.7, 0.0])(LOGITS, batch([0, 2])) == "vLLM's"
    assert sampler(greedy)(LOGITS, batch([0, 2], has_prefill=True)) == "vLLM's"
    assert sampler(greedy)(LOGITS, batch([0, 2], num_draft_tokens=1)) == "vLLM's"
    assert sampler(greedy, compute_nans=True)(LOGITS, batch([0, 2])) == "vLLM's"
    assert sampler(greedy, return_sampling_mask=True)(LOGITS, batch([0, 2])) == "vLLM's"
    assert sampler(greedy, trace_replay_state=object())(LOGITS, batch([0, 2])) == "vLLM's"
    assert sampler(greedy, needs_logits_processing=np.array([0, 0, 1, 0], bool))(LOGITS, batch([0, 2])) == "vLLM's"
    asked = SimpleNamespace(max_num_token_ids=lambda rows: 3)
    assert sampler(greedy, logprob_token_ids_state=asked)(LOGITS, batch([0, 2])) == "vLLM's"
    with_logprobs = sampler(greedy)
    with_logprobs.logprobs[2] = 0
    assert with_logprobs(LOGITS, batch([0, 2])) == "vLLM's"
    assert with_logprobs(LOGITS, batch([0, 1])) != "vLLM's"


def test_a_request_of_a_name_that_ended_is_asked_again() -> None:
    ours = sampler([0.0] * ROWS)
    assert ours(LOGITS, batch([0, 2])) != "vLLM's"
    ours.sampling_states.temperature.np[2] = 1.0
    assert ours(LOGITS, batch([0, 2])) != "vLLM's"  # nobody changes what a request asks
    assert ours(LOGITS, batch([0, 2], has_prefill=True)) == "vLLM's"
    assert ours(LOGITS, batch([0, 2])) == "vLLM's"


def test_vllm_has_what_this_takes() -> None:
    fields = {field.name for field in dataclasses.fields(SamplerOutput) if field.default is dataclasses.MISSING}
    assert fields == {"sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"}
