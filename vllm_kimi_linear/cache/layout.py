"""Shapes and bytes of KDA state and MLA cache, and how vLLM pages them: the only copy of this arithmetic.

Standard library only. Bytes are those of one tensor-parallel rank; `layers` (0-based) restricts an answer to
a pipeline stage.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import ceil, floor, prod

from kda_kernels.constants import CHUNK_SIZE
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.tensors import DTYPE_BYTES, Shape

MIB, GIB = 1 << 20, 1 << 30


def kda_state_shapes(model_sizes: ModelSizes, tensor_parallel: int = 1) -> tuple[Shape, Shape]:
    """Shapes of the two states of one KDA layer and sequence on one rank.

    The convolution's is [conv_kernel_size - 1, 3P], oldest input first, channels q|k|v, in the activations' dtype; the
    recurrence's is [H, V, K], fp32 unless asked otherwise.
    """
    g, ranks = model_sizes, tensor_parallel
    conv = (g.conv_kernel_size - 1, 3 * g.kda_size // ranks)
    return conv, (g.kda_heads // ranks, g.kda_head_dim, g.kda_head_dim)


KERNEL_BLOCK = 16  # tokens: attention kernels read blocks of so many, or of a multiple
# Tokens of which a block is a multiple. On a GPU a prefill passes a state on, and can keep it, every 64 tokens.
BLOCK_MULTIPLE = {"cpu": KERNEL_BLOCK, "cuda": CHUNK_SIZE}
USUAL_BLOCK = 256  # tokens: of about so many are the blocks that `cache_layout` chooses


@dataclass(frozen=True)
class CacheLayout:
    """How vLLM pages the cache of one rank.

    There is one pool of blocks, all of one size in bytes. A block holds the latents of `block_tokens` tokens in every
    MLA layer, or a state of each layer of a group of KDA layers, as many as fit.
    """

    kda_layers: int
    mla_layers: int
    state_bytes: int  # both states of one KDA layer and sequence, before padding
    latent_bytes: int  # one token in one MLA layer; every tensor-parallel rank holds all of it
    block_tokens: int
    block_bytes: int  # a multiple of KERNEL_BLOCK tokens' latents in one layer
    kda_groups: int
    mla_groups: int
    state_pages: int  # blocks per KDA group and sequence: the running state, and one before it for a step or two
    num_blocks: int  # the null block included
    context_parallel: int = 1  # ranks that the latents of a sequence are spread over

    @property
    def kda_state_bytes_per_sequence(self) -> int:
        """Without padding, whatever the context."""
        return self.kda_layers * self.state_bytes

    @property
    def mla_bytes_per_token(self) -> int:
        return self.mla_layers * self.latent_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """A state of every KDA layer, kept for the prefix cache."""
        return self.kda_groups * self.block_bytes

    def held_tokens(self, context: int) -> int:
        """Tokens of a sequence whose latents this rank holds."""
        return ceil(context / self.context_parallel)

    def blocks_per_sequence(self, context: int) -> int:
        """Blocks that a sequence of `context` tokens takes."""
        latents = ceil(self.held_tokens(context) / self.block_tokens)
        return self.mla_groups * latents + self.kda_groups * self.state_pages

    def bytes_per_sequence(self, context: int) -> int:
        """Memory that a sequence of `context` tokens takes, padding included."""
        return self.blocks_per_sequence(context) * self.block_bytes

    def sequences(self, context: int) -> int:
        """How many sequences of `context` tokens fit at once."""
        return max(0, self.num_blocks - 1) // self.blocks_per_sequence(context)

    def longest_context(self, limit: int) -> int:
        """The longest context of up to `limit` tokens of which one sequence fits; 0 if none does."""
        return longest_context(limit, lambda context: self.sequences(context) > 0)

    def describe(self, context: int) -> str:
        """What fits, in a person's words."""
        fitting, each = self.sequences(context), self.bytes_per_sequence(context)
        shared = f" on one rank of {self.context_parallel}" if self.context_parallel > 1 else ""
        return (
            f"the cache of {self.num_blocks * self.block_bytes / GIB:.2f} GiB a rank holds {fitting:,} "
            f"sequence{'' if fitting == 1 else 's'} of "
            f"{context:,} tokens at once, {each / GIB:.3f} GiB each: {self.kda_state_bytes_per_sequence / MIB:.2f} MiB "
            f"of KDA state at any length, {self.mla_bytes_per_token:,} bytes a token of latent cache{shared}, "
            f"and padding to blocks of {self.block_tokens:,} tokens"
        )


def longest_context(limit: int, holds: Callable[[int], bool]) -> int:
    """The longest context up to `limit` tokens that `holds`, which holds for every shorter one; 0 if none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda context: not holds(context))


def cache_layout(
    model_sizes: ModelSizes,
    *,
    activation_dtype: str,
    kv_bytes: int,
    tensor_parallel: int = 1,
    state_dtype: str = "float32",
    block_tokens: int | None = None,
    speculative: int = 0,
    prefix_caching: bool = False,
    layers: Collection[int] | None = None,
    device: str = "cpu",
    context_parallel: int = 1,
) -> CacheLayout:
    """The cache that vLLM makes of `kv_bytes` of memory on one rank.

    `activation_dtype` is also the latents' and the convolution state's. `block_tokens`, a multiple of 16, is
    --block-size, or None to choose for `device`, "cpu" or "cuda". `speculative` is the number of drafted tokens a step,
    each of which has a state of its own.
    """
    conv, recurrent = kda_state_shapes(model_sizes, tensor_parallel)
    state_bytes = prod(conv) * DTYPE_BYTES[activation_dtype] + prod(recurrent) * DTYPE_BYTES[state_dtype]
    latent_bytes = model_sizes.latent_size * DTYPE_BYTES[activation_dtype]
    kda, mla = len(model_sizes.kda_layers), len(model_sizes.mla_layers)
    if block_tokens is None:
        block_tokens = _block_tokens(kda, state_bytes, mla * latent_bytes, BLOCK_MULTIPLE[device])
    groups = ceil(kda / max(1, block_tokens * mla * latent_bytes // state_bytes)) if kda else 0
    # The groups are those of the whole model; a pipeline stage has its own layers of each.
    mla_here = sum(layers is None or i in layers for i in model_sizes.mla_layers)
    kda_here = [layers is None or i in layers for i in model_sizes.kda_layers]
    widest = max((sum(kda_here[group::groups]) for group in range(groups)), default=0)
    kernel_block = KERNEL_BLOCK * latent_bytes
    block_bytes = max(mla_here * block_tokens // KERNEL_BLOCK, ceil(widest * state_bytes / kernel_block)) * kernel_block
    return CacheLayout(
        kda_layers=sum(kda_here),
        mla_layers=mla_here,
        state_bytes=state_bytes,
        latent_bytes=latent_bytes,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        kda_groups=groups,
        mla_groups=1 if mla else 0,
        state_pages=(2 if prefix_caching else 1) + speculative,
        num_blocks=kv_bytes // block_bytes,
        context_parallel=context_parallel,
    )


def _block_tokens(kda_layers: int, state_bytes: int, token_bytes: int, multiple: int) -> int:
    """A multiple near 256, or smaller, whose latents, `token_bytes` a token, some number of states fills."""
    if not kda_layers:
        return KERNEL_BLOCK
    groups = ceil(kda_layers / max(1, round(USUAL_BLOCK * token_bytes / state_bytes)))
    states = ceil(kda_layers / groups)
    multiples = states * state_bytes / (token_bytes * multiple)
    # One state may be wider than the latents beside it; several must fit between them.
    return multiple * (max(1, floor(multiples)) if states == 1 else ceil(multiples))
