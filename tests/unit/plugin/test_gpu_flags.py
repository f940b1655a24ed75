"""What ranks that share latents need of the machine."""

from collections.abc import Callable

import pytest
from vllm.distributed.device_communicators import pynccl_wrapper

from vllm_kimi_linear.config import gpu_flags
from vllm_kimi_linear.config.errors import ConfigError


def library(error: Exception | None = None) -> Callable[[], None]:
    def load() -> None:
        if error is not None:
            raise error

    return load


def test_nccl_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library())
    gpu_flags.check_nccl()


def test_nccl_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes on without a word, and a reduce-scatter of its communicator returns unwritten memory."""
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library(OSError("no libnccl.so.2")))
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/nowhere/libnccl.so.2")
    with pytest.raises(ConfigError, match=r"VLLM_NCCL_SO_PATH is /nowhere/libnccl.so.2; .*: no libnccl.so.2"):
        gpu_flags.check_nccl()


def test_nccl_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", library())
    monkeypatch.setenv("VLLM_DISABLE_PYNCCL", "1")
    with pytest.raises(ConfigError, match=r"VLLM_DISABLE_PYNCCL is set; .*leave it unset"):
        gpu_flags.check_nccl()
