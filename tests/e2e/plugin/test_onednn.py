"""Whether oneDNN has products in bfloat16 is asked for and not guessed."""

import platform

import pytest
import torch

from tests.support.own_process import in_own_process
from vllm_kimi_linear.cpu import products


def ask(dtypes: list[str]) -> list[bool]:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return [products.has_onednn(getattr(torch, dtype)) for dtype in dtypes]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction set of x86")
def test_what_onednn_has_is_asked_for() -> None:
    assert in_own_process(ask, ["float32", "bfloat16"], ONEDNN_MAX_CPU_ISA="AVX2") == [True, False]
