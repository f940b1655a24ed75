"""Checkpoint names -> parameters. Every tensor is accounted for: none too many, none missing, none misshapen."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.log import logger

# Parts of a mixer's input projection, of the gates' second factors and of the packed convolution, as they lie there.
MLA_IN_PROJ = ("q_proj", "kv_a_proj_with_mqa")
KDA_IN_PROJ = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
GATES_B = ("f_b_proj", "g_b_proj")
CONV = ("q_conv1d", "k_conv1d", "v_conv1d")
GATE_UP = ("gate_proj", "up_proj")
EXPERTS = {"w1": "w13_weight", "w2": "w2_weight", "w3": "w13_weight"}


# A buffer that older code saved; nothing here rotates.
SPARE = re.compile(r".*\.rotary_emb\.inv_freq")
# Tensors of a model as transformers holds it while it runs, some stacked; it saves them in the original layout.
RUNNING = re.compile(r".*\.(forget_gate\..*|conv1d\.weight|experts\.(gate_up|down)_proj)")


class WeightError(ValueError):
    """A checkpoint that does not fit its config; the message names the tensor."""


@dataclass(frozen=True)
class Target:
    """Where one checkpoint tensor goes: a parameter of the model, the shapes it may have, its loader's arguments."""

    parameter: str
    shapes: tuple[tensors.Shape, ...]
    arguments: tuple[object, ...] = ()


@cache  # a trainer may send tensors one by one
def targets(model_sizes: ModelSizes) -> dict[str, Target]:
    """The target of every tensor of the original layout, by checkpoint name."""
    table = {}
    for weight in tensors.weights(model_sizes):
        kda = weight.layer is not None and model_sizes.layer_types[weight.layer] == "kda"
        parameter, arguments = _parameter(weight.name, kda)
        shapes: tuple[tensors.Shape, ...] = (weight.shape,)
        if weight.name.endswith("A_log"):
            shapes += ((model_sizes.kda_heads,),)
        table[weight.name] = Target(parameter, shapes, arguments)
    return table


def other_names(table: dict[str, Target]) -> dict[str, str]:
    """Names that transformers saves tensors under -> those of `table`: a dense feed-forward as block_sparse_moe."""
    return {name.replace(".mlp.", ".block_sparse_moe."): name for name in table if ".mlp." in name}


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


def load(
    model: nn.Module, model_sizes: ModelSizes, weights: Iterable[tuple[str, torch.Tensor]], *, whole: bool = True
) -> set[str]:
    """Load `weights`, of a whole checkpoint or not, into `model`; return the names of the parameters written.

    Tensors of pipeline stages held elsewhere are checked and skipped. Raises WeightError, naming the tensor,
    for one that the config does not call for, one whose shape is wrong, one stored twice, or one that is missing.
    """
    table = targets(model_sizes)
    others = other_names(table)
    parameters = dict(model.named_parameters())
    missing, loaded = set(table), set()
    for name, tensor in weights:
        if SPARE.fullmatch(name):
            logger.info_once("Skipping rotary_emb.inv_freq of the checkpoint: this model rotates nothing")
            continue
        original = others.get(name, name)
        target = table.get(original)
        if target is None:
            remedy = "remove it, or correct the layer lists and sizes in config.json"
            if RUNNING.fullmatch(name):
                remedy = "save the model by transformers' save_pretrained, in the original layout"
            raise WeightError(f"checkpoint tensor {name} is not part of this model: {remedy}")
        if tuple(tensor.shape) not in target.shapes:
            wanted = " or ".join(str(list(shape)) for shape in target.shapes)
            raise WeightError(
                f"checkpoint tensor {name} has shape {list(tensor.shape)} where config.json asks for {wanted}: "
                "correct the sizes in config.json or use the checkpoint they belong to"
            )
        if original not in missing:
            raise WeightError(f"checkpoint tensor {name} is stored twice: remove one of the two")
        missing.discard(original)
        if target.parameter in parameters:  # else another pipeline stage holds its layer
            _load_one(parameters[target.parameter], tensor, target.arguments)
            loaded.add(target.parameter)
    if whole and missing:
        first, more = min(missing), len(missing) - 1
        rest = f" and {more} more" if more else ""
        raise WeightError(
            f"checkpoint tensor {first}{rest} is missing: the checkpoint is incomplete, "
            "or config.json describes another model"
        )
    return loaded


def _load_one(parameter: nn.Parameter, tensor: torch.Tensor, arguments: tuple[object, ...]) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:
        parameter.data.copy_(tensor)
    elif len(arguments) == 3:
        name, shard, expert = arguments
        loader(parameter, tensor, name, shard_id=shard, expert_id=expert)
    else:
        loader(parameter, tensor, *arguments)
