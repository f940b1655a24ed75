"""Which parameter each tensor of the original checkpoint goes to, and how each is held. Standard library only."""

import re
from functools import cache

from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.quantization import FIELD, Scheme

# Parts of a mixer's input projection, of the gates' second factors and of the packed convolution, as they lie there.
MLA_IN_PROJ = ("q_proj", "kv_a_proj_with_mqa")
KDA_IN_PROJ = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
GATES_B = ("f_b_proj", "g_b_proj")
CONV = ("q_conv1d", "k_conv1d", "v_conv1d")
GATE_UP = ("gate_proj", "up_proj")
EXPERTS = {"w1": "w13_weight", "w2": "w2_weight", "w3": "w13_weight"}


@cache
def held_as(model_sizes: ModelSizes, device: str = "cpu") -> dict[str, Scheme | None]:
    """How each parameter made of linear layers is held: as its checkpoint has it, or None for plain.

    Plain are those that the kernels of attention read (`gates_b`, `kv_b_proj`), those made of layers that differ and,
    on a GPU ("cuda"), those made of layers that end within a block of scales. Raises ConfigError for experts of one
    layer that differ.
    """
    found: dict[str, set[Scheme | None]] = {}
    cut: set[str] = set()
    for weight in tensors.weights(model_sizes):
        if weight.linear_layer is not None:
            parameter, _ = parameter_of(weight, model_sizes)
            scheme = stored_as(weight, model_sizes)
            found.setdefault(parameter, set()).add(scheme)
            if device == "cuda" and scheme is not None and scheme.block and weight.shape[0] % scheme.block[0]:
                cut.add(parameter)
    table: dict[str, Scheme | None] = {}
    for parameter, kinds in found.items():
        experts, _, _ = parameter.partition(".routed_experts.")
        if experts != parameter and len(kinds | found[f"{experts}.routed_experts.w13_weight"]) > 1:
            raise ConfigError(f"{FIELD} stores the parts of {experts} in several formats; give them all one")
        plain = len(kinds) > 1 or parameter in cut or parameter.endswith(("gates_b", "kv_b_proj.weight"))
        table[parameter] = None if plain else next(iter(kinds))
    return table


def stored_as(weight: tensors.Weight, model_sizes: ModelSizes) -> Scheme | None:
    """How the checkpoint has a tensor; None for plain."""
    if weight.linear_layer is None or model_sizes.quantization is None:
        return None
    return model_sizes.quantization.scheme(weight.linear_layer)


def parameter_of(weight: tensors.Weight, model_sizes: ModelSizes) -> tuple[str, tuple[object, ...]]:
    """Parameter and loader arguments of one tensor of the original checkpoint."""
    kda = weight.layer is not None and model_sizes.layer_types[weight.layer] == "kda"
    return _parameter(weight.name, kda)


def _parameter(name: str, kda: bool) -> tuple[str, tuple[object, ...]]:
    """Parameter and loader arguments of one tensor; the projections of a mixer's input are packed."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(w[123])\.weight", name)
    if expert:
        parameter = f"{expert[1]}.routed_experts.{EXPERTS[expert[3]]}"
        return parameter, (parameter, expert[3], int(expert[2]))
    stem, _, _ = name.removesuffix(".weight").rpartition(".")
    part = name.removesuffix(".weight").removeprefix(f"{stem}.")
    if part in GATE_UP:
        return f"{stem}.gate_up_proj.weight", (GATE_UP.index(part),)
    in_proj = KDA_IN_PROJ if kda else MLA_IN_PROJ
    if stem.endswith("self_attn") and part in in_proj:
        return f"{stem}.in_proj.weight", (in_proj.index(part),)
    if kda and stem.endswith("self_attn"):
        if part in GATES_B:
            return f"{stem}.gates_b", (GATES_B.index(part),)
        if part in CONV:
            return f"{stem}.conv_weight", (CONV.index(part),)
        if part == "o_norm":
            return f"{stem}.o_norm_weight", ()
    return name, ()
