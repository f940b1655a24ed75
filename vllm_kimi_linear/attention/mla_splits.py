"""Let the latent attention of a few long sequences use the whole GPU."""

import functools
from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

WIDE = 4  # times as many parts of a context as vLLM's default, where few sequences decode
FEW = 8  # tokens of a step that count as few, however small the largest graph is


def split_contexts_of_few(original: Function) -> Function:
    def _build_decode(self: Any, *, num_decode_tokens: Any, **kwargs: Any) -> Any:
        from vllm.config import AttentionConfig

        config, default = self.vllm_config, AttentionConfig.flash_attn_max_num_splits_for_cuda_graph
        if (
            config.model_config.architecture == ARCHITECTURE
            and config.attention_config.flash_attn_max_num_splits_for_cuda_graph == default  # else the user's stands
            and self.max_num_splits >= default  # else graphs are off, or batches invariant
        ):
            few = few_tokens(tuple(config.compilation_config.cudagraph_capture_sizes))
            self.max_num_splits = default * (WIDE if num_decode_tokens <= few else 1)
        return original(self, num_decode_tokens=num_decode_tokens, **kwargs)

    return _build_decode


@functools.cache  # asked in every step
def few_tokens(graphs: tuple[int, ...]) -> int:
    """The largest graph's tokens, of these, that count as few: a step and the graph that it is padded to agree."""
    bound = max([FEW, *(size // WIDE for size in graphs)])
    return max((size for size in graphs if size <= bound), default=0)


PATCH = Patch(
    symptom="Decoding one sequence of a million tokens uses a third of the memory's bandwidth (`docs/performance.md`).",
    cause="In a CUDA graph FLASH_ATTN_MLA splits a sequence into at most 32 parts, one for each multiprocessor, of "
    "which a Hopper has 132. The limit bounds the buffers of partial results, whose size is parts times tokens of "
    "the step: steps of up to a quarter of the largest graph's tokens can have four times the parts in the same "
    "memory.",
    upstream="vllm-project/vllm#35899, closed, lifted the limit for graphs of every size.",
    remove_when="the limit depends on the size of the graph.",
    device="cuda",
    speed=True,
    hooks=(
        Hook(
            "vllm.v1.attention.backends.mla.flashattn_mla:FlashAttnMLAMetadataBuilder._build_decode",
            "self ... num_decode_tokens ...",
            split_contexts_of_few,
        ),
    ),
)
