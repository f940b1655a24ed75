"""The operations of a decode step: Triton on NVIDIA GPUs, C on a CPU."""

import importlib
from functools import cache
from typing import Any


@cache
def kernels(device: str) -> Any:
    """The module with the operations for tensors of this type of device, "cuda" or "cpu".

    It has the operations of `reference`. Raises ImportError where Triton is missing, or the C library was not built.
    """
    return importlib.import_module(f"decode_kernels.{device}")
