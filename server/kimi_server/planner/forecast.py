"""The memory of one rank of a server, computed before it starts: weights, activations, and what is left for the cache.

Standard library only. Weights and cache are exact: the tests compare them with what vLLM builds and allocates.
Activations are an estimate, and the runtime an allowance; on a GPU vLLM measures both and sizes the cache itself.
"""

from dataclasses import dataclass
from functools import cache

from kda_kernels.constants import CHUNK_SIZE
from kimi_server.planner.weight_bytes import weight_bytes
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.cache.layout import GIB, CacheLayout
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.tensors import DTYPE_BYTES

# vLLM pads the vocabulary, and we the rows of KDA's input projection, to multiples of these.
VOCABULARY_MULTIPLE, PROJECTION_MULTIPLE = 64, 16
# Tokens of earlier chunks whose latents are expanded at a time: vLLM's largest workspace, and our backend's on a CPU.
CONTEXT_TOKENS = {"cuda": 64 * 1024, "cpu": 1024}
# CUDA context, communicators and graphs of a rank: an allowance. On a CPU `memory` is given without the processes' own.
RUNTIME = {"cuda": 2 * GIB, "cpu": 0}


@cache  # of one layout it is asked for several numbers of servers
def held_weight_bytes(model_sizes: ModelSizes, dtype: str, tensor_parallel: int = 1, device: str = "cpu") -> int:
    """Bytes of weights that one rank of the loaded model holds.

    Beside the checkpoint's: the padding of the vocabulary and of KDA's input projection, the router in fp32 (GPUs
    from Hopper on keep it in `dtype`), and the two halves of kv_b_proj that vLLM copies for absorbed attention.
    """
    g, ranks, size = model_sizes, tensor_parallel, DTYPE_BYTES[dtype]
    matrices = 1 if g.tied_embeddings else 2
    vocabulary = matrices * (-g.vocab_size % VOCABULARY_MULTIPLE) // ranks * g.hidden_size
    projection = -_projection_rows(g, ranks) % PROJECTION_MULTIPLE * g.hidden_size * len(g.kda_layers)
    absorbed = g.attention_heads // ranks * (g.qk_nope_head_dim + g.v_head_dim) * g.kv_lora_rank * len(g.mla_layers)
    router = g.num_experts * g.hidden_size * sum(g.layer_moe) * (DTYPE_BYTES["float32"] - size)
    own = weight_bytes(g, dtype, tensor_parallel=ranks, device=device)
    return own + (vocabulary + projection + absorbed) * size + router


def _projection_rows(g: ModelSizes, ranks: int) -> int:
    """Outputs of KDA's input projection on one rank: q, k, v, beta, and the low-rank inputs of the two gates."""
    return (3 * g.kda_size + g.kda_heads) // ranks + 2 * g.kda_head_dim


def activation_bytes(
    model_sizes: ModelSizes,
    dtype: str,
    device: str,
    batch_tokens: int,
    batch_sequences: int,
    tensor_parallel: int = 1,
) -> int:
    """Bytes that the largest step takes on one rank: an estimate.

    It counts, for `batch_tokens` rows in `dtype`, the hidden states, the residual and the normed input, and beside
    them the largest of:
    - a KDA layer: projections, gates and output; on a GPU the prefill kernels' chunk products and states;
    - an MLA layer: queries, keys, values and output, and the keys and values of a stretch of earlier tokens;
    - a feed-forward: both halves of the hidden layer and the answers, for each chosen expert;
    - logits: one row of fp32 a sequence, and one copy for the sampler.
    It leaves out fragmentation, the libraries' own workspaces and the buffers of communication.
    """
    g, ranks, size = model_sizes, tensor_parallel, DTYPE_BYTES[dtype]
    heads, kda_heads, kda = g.attention_heads // ranks, g.kda_heads // ranks, g.kda_size // ranks
    scratch = 0
    if device == "cuda":  # four tiles, the products inside a chunk and its state, in 16 bits
        scratch = 2 * kda_heads * (4 * g.kda_head_dim + CHUNK_SIZE + g.kda_head_dim**2 // CHUNK_SIZE)
    expanded = heads * (2 * g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim)
    query = heads * (g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim)
    width, choices = g.moe_intermediate_size // ranks, g.experts_per_token
    largest = max(
        batch_tokens * ((_projection_rows(g, ranks) + 3 * kda) * size + scratch),
        (batch_tokens * (query + expanded) + CONTEXT_TOKENS[device] * (g.latent_size + expanded)) * size,
        batch_tokens * choices * (max(2 * width, g.hidden_size) + width) * size,
        batch_tokens * 3 * (g.intermediate_size // ranks) * size,
        2 * batch_sequences * g.vocab_size * DTYPE_BYTES["float32"],
    )
    return 3 * batch_tokens * g.hidden_size * size + largest


@dataclass(frozen=True)
class Forecast:
    """The memory of one rank, in bytes. All tensor-parallel ranks are alike."""

    memory: int  # what the rank may use in all
    weights: int
    activations: int
    runtime: int
    plan: CacheLayout  # the cache made of what is left; without a block if nothing is

    @property
    def cache(self) -> int:
        """Bytes left for the cache; negative where weights, activations and runtime alone are too much."""
        return self.memory - self.weights - self.activations - self.runtime

    def sequences(self, context: int) -> int:
        """How many sequences of `context` tokens fit at once."""
        return self.plan.sequences(context)

    def kda_bytes(self, sequences: int) -> int:
        """The states of the KDA layers, without padding."""
        return sequences * self.plan.state_pages * self.plan.kda_state_bytes_per_sequence

    def latent_bytes(self, sequences: int, context: int) -> int:
        """The latent cache of the MLA layers, without padding."""
        return sequences * self.plan.held_tokens(context) * self.plan.mla_bytes_per_token

    def cache_bytes(self, sequences: int, context: int) -> int:
        """What both take, padding and vLLM's null block included."""
        return sequences * self.plan.bytes_per_sequence(context) + self.plan.block_bytes

    def shortage(self, sequences: int, context: int) -> int:
        """Bytes that are missing for so many sequences; 0 if they fit."""
        return max(self.cache_bytes(sequences, context) - self.cache, 0)


def forecast(
    model_sizes: ModelSizes,
    *,
    memory_bytes: int,
    dtype: str,
    device: str,
    batch_tokens: int,
    batch_sequences: int,
    tensor_parallel: int = 1,
    state_dtype: str = "float32",
    context_parallel: int = 1,
) -> Forecast:
    """The memory of one rank that may use `memory_bytes`. `device` is "cpu" or "cuda".

    With prefix caching, but where `context_parallel` ranks share the latents: together they are refused.
    """
    weights = held_weight_bytes(model_sizes, dtype, tensor_parallel, device)
    activations = activation_bytes(model_sizes, dtype, device, batch_tokens, batch_sequences, tensor_parallel)
    plan = layout.cache_layout(
        model_sizes,
        activation_dtype=dtype,
        kv_bytes=max(memory_bytes - weights - activations - RUNTIME[device], 0),
        state_dtype=state_dtype,
        tensor_parallel=tensor_parallel,
        prefix_caching=context_parallel == 1,
        device=device,
        context_parallel=context_parallel,
    )
    return Forecast(memory_bytes, weights, activations, RUNTIME[device], plan)
