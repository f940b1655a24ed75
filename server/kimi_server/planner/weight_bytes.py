"""Bytes of a checkpoint's weights on one rank, as they are held there."""

from functools import cache
from math import prod

from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import held_as, parameter_of, stored_as
from vllm_kimi_linear.config.quantization import Scheme
from vllm_kimi_linear.config.tensors import DTYPE_BYTES, Weight, weights

ROW_PARALLEL = (".o_proj", ".down_proj", ".w2")  # layers whose columns are divided among the ranks


@cache  # what would fit is looked for among many machines, and the checkpoint has thousands of tensors
def weight_bytes(
    model_sizes: ModelSizes,
    dtype: str,
    layers: range | None = None,
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
            total += _quantized(w, scheme, ranks, device)
    return total


def _quantized(weight: Weight, scheme: Scheme, ranks: int, device: str) -> int:
    """Values and scales of one weight. A CPU has a scale in fp32 for each row; one of a whole row is not divided."""
    rows, columns = weight.shape
    tensors = scheme.tensors(rows, columns)
    values, size = tensors[scheme.values]
    (scale_rows, groups), scale_size = tensors["weight_scale"]
    if device == "cpu":
        scale_rows, scale_size = rows, DTYPE_BYTES["float32"]
    whole = groups == 1 and weight.name.removesuffix(".weight").endswith(ROW_PARALLEL)
    return prod(values) * size // ranks + scale_rows * groups * scale_size // (1 if whole else ranks)
