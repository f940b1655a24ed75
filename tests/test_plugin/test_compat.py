"""The patches of vLLM do what they say, on the version that is installed."""

import time

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from vllm_kimi_linear import compat


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on a GPU machine polling takes no core from the work")
def test_waiting_processes_leave_the_cores(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", None)  # put back at the end, whatever is applied here
    monkeypatch.setattr(time, "sleep", naps.append)
    compat.apply()  # takes the replaced sleep
    shm_broadcast.sched_yield()
    assert naps == [compat.POLL_SECONDS]


def test_unknown_version_is_left_alone(monkeypatch):
    def original() -> None:
        raise AssertionError

    monkeypatch.setattr(shm_broadcast, "sched_yield", original)
    monkeypatch.setattr(compat, "vllm_version", "0.99.0")
    compat.apply()
    assert shm_broadcast.sched_yield is original
