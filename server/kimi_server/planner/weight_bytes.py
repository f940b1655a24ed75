"""Bytes of a checkpoint's weights on one rank."""

from collections.abc import Collection
from math import prod

from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import held_as, parameter_of, stored_as
from vllm_kimi_linear.config.tensors import DTYPE_BYTES, weights


def weight_bytes(
    model_sizes: ModelSizes,
    dtype: str,
    layers: Collection[int] | None = None,
    tensor_parallel: int = 1,
    device: str = "cpu",
) -> int:
    """Bytes of weights on one rank; a stage with the first layer embeds, one with the last has the head."""
    total, last, held = 0, model_sizes.num_layers - 1, held_as(model_sizes, device)
    for w in weights(model_sizes):
        beside = {w.layer}
        if w.name.startswith("model.embed_tokens"):
            beside = {0, last} if model_sizes.tied_embeddings else {0}
        elif w.layer is None:
            beside = {last}
        if layers is None or not beside.isdisjoint(layers):
            ranks = tensor_parallel if w.split else 1
            scheme = stored_as(w, model_sizes)
            if scheme is None or held[parameter_of(w, model_sizes)[0]] is None:
                total += prod(w.shape) // ranks * DTYPE_BYTES["float32" if w.fp32 else dtype]
                continue
            rows, columns = w.shape
            total += sum(prod(shape) * size // ranks for shape, size in scheme.tensors(rows, columns).values())
    return total
