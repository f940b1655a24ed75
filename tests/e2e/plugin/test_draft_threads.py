"""vLLM's look-up of n-gram drafts leaves torch its number of threads."""

from types import SimpleNamespace
from typing import Any

import numba

from tests.support.own_process import in_own_process


def look_up(ours: bool) -> list[Any]:
    """Drafts, and threads of torch afterwards; numba asks for all cores in the first call of a process."""
    import numpy
    import torch
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    import vllm_kimi_linear
    from vllm_kimi_linear.patches.patch import serve_ours

    vllm_kimi_linear.register()
    if ours:
        serve_ours()
    torch.set_num_threads(1)
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(prompt_lookup_min=2, prompt_lookup_max=3, num_speculative_tokens=2),
        model_config=SimpleNamespace(max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    tokens = numpy.array([[1, 2, 3, 4, 5, 1, 2, 3]], dtype=numpy.int32)
    drafts = NgramProposer(config).batch_propose(1, [0], numpy.array([8], dtype=numpy.int32), tokens, 2)
    return [drafts, torch.get_num_threads()]


def test_drafts_leave_torch_its_threads() -> None:
    assert in_own_process(look_up, True) == [[[4, 5]], 1]


def test_another_model_is_served_as_by_vllm() -> None:
    assert in_own_process(look_up, False) == [[[4, 5]], numba.config.NUMBA_NUM_THREADS]
