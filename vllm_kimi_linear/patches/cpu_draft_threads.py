"""Keep the number of torch's threads where drafts are looked up by numba, on a CPU."""

from typing import Any

import torch

from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def keep_threads(original: Function) -> Function:
    def batch_propose(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        drafts = original(*args, **kwargs)
        if torch.get_num_threads() != threads:
            torch._C.set_num_threads(threads)  # a CPU worker has put a warning in the place of torch's own
        return drafts

    return batch_propose


PATCH = Patch(
    symptom="With n-gram drafts on a CPU each worker computes with as many threads as the machine has cores, whatever "
    "OMP_NUM_THREADS says: two ranks, or two servers, wait for each other's threads.",
    cause="vLLM looks drafts up in a parallel function of numba, whose first call tells OpenMP to use all cores; torch "
    "computes by the same OpenMP (numba/numba#9387). The look-up itself uses one thread.",
    remove_when="numba leaves OpenMP's number alone, or vLLM's function is not parallel.",
    device="cpu",
    scope="process",
    hooks=(
        Hook(
            "vllm.v1.spec_decode.ngram_proposer:NgramProposer.batch_propose",
            "self num_requests valid_ngram_requests num_tokens_no_spec token_ids_cpu k",
            keep_threads,
        ),
    ),
    speed=True,
)
