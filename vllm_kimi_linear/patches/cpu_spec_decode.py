"""Sample right with drafted tokens on a CPU.

Symptom: with --speculative-config on a CPU and a temperature above 0 the text is garbled and one seed gives two
    answers; with `top_k`, in a request or in generation_config.json, the engine ends (`max(): Expected reduction dim`).
Cause: where no Triton kernel runs, `cpu_triton_utils._expand_kernel_impl` hands the C++ kernel a converted copy of its
    output and drops it, so that each drafted token's temperature, top_p and top_k are what the memory held before;
    `apply_top_k_only` takes the largest k of no rows in a step in which nothing was drafted; and the C++ kernel of
    `_rejection_random_sample_kernel_impl` looks up the probability of a placeholder (-1), which is another row's.
Upstream: not reported yet.
Remove when: the first copies its result back, or keeps the dtype, the second returns early where there is no row, and
    the third refuses placeholders.

All stand for every model of the process. What they give for our model is right for any: the first and the third equal
the Triton kernels, and the second differs only where the original raises.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils


def apply() -> None:
    """Replace all three, on a CPU. Idempotent. Comes before a worker registers what stands for Triton kernels."""
    if not current_platform.is_cpu():
        return
    cpu_triton_utils._expand_kernel_impl = expand

    from vllm.v1.sample.ops import topk_topp_sampler

    if hasattr(topk_topp_sampler.apply_top_k_only, "keeps_kimi_linear"):
        return
    top_k_only: Callable = topk_topp_sampler.apply_top_k_only
    random_sample: Callable = cpu_triton_utils._rejection_random_sample_kernel_impl

    @functools.wraps(top_k_only)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return top_k_only(logits, k) if len(logits) else logits

    @functools.wraps(random_sample)
    def rejection_random_sample(*args: Any, **kwargs: Any) -> None:
        found = inspect.signature(random_sample).bind(*args, **kwargs).arguments
        drafts, uniform = found["draft_token_ids"], found["uniform_probs"]
        found["draft_token_ids"] = drafts.clamp(min=0)
        found["uniform_probs"] = uniform.masked_fill(drafts < 0, torch.inf)  # no probability reaches it
        random_sample(**found)

    vars(apply_top_k_only)["keeps_kimi_linear"] = True
    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    cpu_triton_utils._rejection_random_sample_kernel_impl = rejection_random_sample


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write each request's value to all of its tokens, `replace_to` for a value of `replace_from`.

    output [tokens] and values [requests], of one dtype; cu_num_tokens int [requests], the tokens up to and including
    each request's.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))
