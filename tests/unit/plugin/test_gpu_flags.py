"""What several GPUs need of the machine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators import pynccl_wrapper

from vllm_kimi_linear.config import gpu_flags
from vllm_kimi_linear.config.errors import ConfigError


def library(error: Exception | None = None) -> Callable[[], None]:
    def load() -> None:
        if error is not None:
            raise error

    return load


def parallel(**sizes: int) -> Any:
    names = ("decode_context_parallel_size", "pipeline_parallel_size", "data_parallel_size", "tensor_parallel_size")
    return SimpleNamespace(**dict.fromkeys(names, 1) | sizes)


def test_nccl_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library())
    gpu_flags.check_nccl(parallel(decode_context_parallel_size=2, pipeline_parallel_size=2))


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_nccl_that_does_not_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes on without a word: a reduce-scatter of its communicator returns unwritten memory."""
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library(AttributeError("undefined symbol: ncclCommSuspend")))
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/nowhere/libnccl.so.2")
    sentence = (
        f"VLLM_NCCL_SO_PATH is /nowhere/libnccl.so.2; --{name.replace('_', '-')} needs NCCL, .*: undefined symbol"
    )
    with pytest.raises(ConfigError, match=sentence):
        gpu_flags.check_nccl(parallel(**{name: 2}))


def test_nccl_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library())
    monkeypatch.setenv("VLLM_DISABLE_PYNCCL", "1")
    with pytest.raises(ConfigError, match=r"VLLM_DISABLE_PYNCCL is set; .*leave it unset"):
        gpu_flags.check_nccl(parallel(pipeline_parallel_size=2))


def test_ranks_that_only_reduce_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library(OSError("no libnccl.so.2")))
    gpu_flags.check_nccl(parallel(tensor_parallel_size=4))
