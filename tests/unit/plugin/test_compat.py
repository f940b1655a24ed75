"""The patches of vLLM do what they say, on the version that is installed."""

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import version
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from vllm_kimi_linear import ARCHITECTURE, compat


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on a GPU machine polling takes no core from the work")
def test_waiting_processes_leave_the_cores(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", None)  # put back at the end, whatever is applied here
    monkeypatch.setattr(time, "sleep", naps.append)
    compat.sleep_between_polls_on_cpu()  # takes the replaced sleep
    shm_broadcast.sched_yield()
    assert naps == [compat.POLL_SECONDS]


def test_unknown_version_is_left_alone(monkeypatch):
    def fails() -> None:
        raise AssertionError

    monkeypatch.setattr(version, "__version__", "0.99.0")
    monkeypatch.setattr(compat, "end_chunks_at_blocks", fails)
    monkeypatch.setattr(shm_broadcast, "sched_yield", fails)
    compat.apply()
    compat.sleep_between_polls_on_cpu()
    assert shm_broadcast.sched_yield is fails


@pytest.fixture
def parts(monkeypatch) -> Callable[..., int]:
    """Into how many parts a step of so many tokens is cut, with graphs up to 128 tokens."""

    class Builder:
        max_num_splits = 32

        def _build_decode(self, num_decode_tokens: int) -> int:
            return self.max_num_splits

    module = SimpleNamespace(FlashAttnMLAMetadataBuilder=Builder)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.mla.flashattn_mla", module)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    compat.split_contexts_of_few()

    def parts(tokens: int, asked: int = 32, architecture: str = ARCHITECTURE, most: int = 32) -> int:
        builder: Any = Builder()
        builder.max_num_splits = most
        builder.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(architecture=architecture),
            attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=asked),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32, 64, 128]),
        )
        builder._build_decode(num_decode_tokens=128)
        return builder._build_decode(num_decode_tokens=tokens)

    return parts


def test_few_sequences_are_cut_into_more_parts(parts):
    assert [parts(tokens) for tokens in (1, 8, 32, 33, 128)] == [128, 128, 128, 32, 32]


def test_parts_stay_as_they_are_where_somebody_chose_them(parts):
    assert parts(1, asked=64, most=64) == 64
    assert parts(1, architecture="DeepseekV3ForCausalLM") == 32
    assert parts(1, most=0) == 0  # no graphs
    assert parts(1, most=1) == 1  # invariant batches


@pytest.mark.parametrize(
    ("graphs", "few"), [((1, 2, 4, 8), 8), ((1, 2, 4), 4), ((1, 2, 4, 8, 16, 24, 32), 8), ((512, 128, 1), 128), ((), 0)]
)
def test_a_step_counts_as_few_if_its_graph_does(graphs, few):
    assert compat.few_tokens(graphs) == few
