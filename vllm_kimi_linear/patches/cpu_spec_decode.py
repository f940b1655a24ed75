"""Sample correctly with drafted tokens on a CPU, where Python and C++ replace vLLM's Triton kernels."""

import inspect
from typing import Any

import torch

from vllm_kimi_linear.patches.patch import Function, Hook, Patch

KERNELS = "vllm.utils.cpu_triton_utils"


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write each request's value to all of its tokens, `replace_to` for a value of `replace_from`.

    output [tokens] and input_val [requests], of one dtype; cu_num_tokens int [requests], the tokens up to and including
    each request's.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(input_val.masked_fill(input_val == replace_from, replace_to).repeat_interleave(counts))


def end_without_rows(original: Function) -> Function:
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return original(logits, k) if len(logits) else logits

    return apply_top_k_only


def refuse_placeholders(original: Function) -> Function:
    def rejection_random_sample(*args: Any, **kwargs: Any) -> None:
        found = inspect.signature(original).bind(*args, **kwargs).arguments
        drafts, uniform = found["draft_token_ids"], found["uniform_probs"]
        found["draft_token_ids"] = drafts.clamp(min=0)
        found["uniform_probs"] = uniform.masked_fill(drafts < 0, torch.inf)  # no probability reaches it
        original(**found)

    return rejection_random_sample


PATCH = Patch(
    symptom="With --speculative-config on a CPU and a temperature above 0 the text is garbled, and one seed gives "
    "two answers. With `top_k`, in a request or in generation_config.json, the engine ends (`max(): Expected "
    "reduction dim`).",
    cause="Three faults. `cpu_triton_utils._expand_kernel_impl` lets the C++ kernel write to a converted copy of "
    "its output and drops the copy, so each drafted token's temperature, top_p and top_k are whatever the memory "
    "held before. `apply_top_k_only` takes the maximum of no rows in a step without drafts. The C++ kernel of "
    "`_rejection_random_sample_kernel_impl` looks up the probability of a placeholder (-1), which is in another "
    "row.",
    remove_when="the first copies its result back or keeps the dtype, the second returns early without rows, and "
    "the third refuses placeholders.",
    device="cpu",
    scope="process",
    hooks=(
        Hook(
            f"{KERNELS}:_expand_kernel_impl",
            "output input_val cu_num_tokens replace_from replace_to MAX_NUM_TOKENS",
            lambda original: expand,
        ),
        Hook(
            f"{KERNELS}:_rejection_random_sample_kernel_impl",
            "... draft_token_ids ... uniform_probs ...",
            refuse_placeholders,
        ),
        Hook("vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only", "logits k", end_without_rows),
    ),
)
