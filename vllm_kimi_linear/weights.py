"""Checkpoint names -> parameters. Every tensor is accounted for: none too many, none missing, none misshapen."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import held_as, parameter_of, stored_as
from vllm_kimi_linear.config.quantization import Scheme
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.quantized.weights import plain, row_scales

# A buffer that older code saved; nothing here rotates.
SPARE = re.compile(r".*\.rotary_emb\.inv_freq")
# Tensors of a model as transformers holds it while it runs, some stacked; it saves them in the original layout.
RUNNING = re.compile(r".*\.(forget_gate\..*|conv1d\.weight|experts\.(gate_up|down)_proj)")


class WeightError(ValueError):
    """A checkpoint that does not fit its config; the message names the tensor."""


@dataclass(frozen=True)
class Target:
    """Where one checkpoint tensor goes: a parameter of the model, the shapes it may have, its loader's arguments."""

    parameter: str  # "": it only says what another one's shape is
    shapes: tuple[tensors.Shape, ...]
    arguments: tuple[object, ...] = ()
    part: tuple[str, str, Scheme] | None = None  # of the plain weight of a name: which of its two tensors, how stored
    scales: tuple[Scheme, int] | None = None  # those of so many rows


@cache  # a trainer may send tensors one by one
def targets(model_sizes: ModelSizes, device: str = "cpu") -> dict[str, Target]:
    """The target of every tensor of the checkpoint, by its name there."""
    table, held = {}, held_as(model_sizes, device)
    for weight in tensors.weights(model_sizes):
        parameter, arguments = parameter_of(weight, model_sizes)
        scheme = stored_as(weight, model_sizes)
        if scheme is None:
            shapes: tuple[tensors.Shape, ...] = (weight.shape,)
            if weight.name.endswith("A_log"):
                shapes += ((model_sizes.kda_heads,),)
            table[weight.name] = Target(parameter, shapes, arguments)
            continue
        rows, columns = weight.shape
        for suffix, (shape, _) in scheme.tensors(rows, columns).items():
            name = weight.name.removesuffix("weight") + suffix
            if suffix == "weight_shape":
                table[name] = Target("", (weight.shape,))
            elif held[parameter] is None:
                table[name] = Target(parameter, (shape,), arguments, (weight.name, suffix, scheme))
            else:
                stored = parameter.removesuffix("weight") + suffix
                own = tuple(stored if argument == parameter else argument for argument in arguments)
                table[name] = Target(stored, (shape,), own, scales=(scheme, rows) if suffix == "weight_scale" else None)
    return table


def other_names(table: dict[str, Target]) -> dict[str, str]:
    """Names that transformers saves tensors under -> those of `table`: a dense feed-forward as block_sparse_moe."""
    return {name.replace(".mlp.", ".block_sparse_moe."): name for name in table if ".mlp." in name}


def load(
    model: nn.Module,
    model_sizes: ModelSizes,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    device: str = "cpu",
    whole: bool = True,
) -> set[str]:
    """Load `weights`, of a whole checkpoint or not, into `model`; return the names of the parameters written.

    Tensors of pipeline stages held elsewhere are checked and skipped. Raises WeightError, naming the tensor,
    for one that the config does not call for, one whose shape is wrong, one stored twice, or one that is missing.
    """
    table = targets(model_sizes, device)
    others = other_names(table)
    # Layers that vLLM wrapped for adapters hold theirs one level further down.
    parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    missing, loaded = set(table), set()
    parts: dict[str, dict[str, torch.Tensor]] = {}  # of weights that come in several tensors and are held in one
    for name, tensor in weights:
        if SPARE.fullmatch(name):
            logger.info_once("Skipping rotary_emb.inv_freq of the checkpoint: this model has no rotary positions")
            continue
        original = others.get(name, name)
        target = table.get(original)
        if target is None:
            remedy = "remove it, or correct the layer lists and sizes in config.json"
            if RUNNING.fullmatch(name):
                remedy = "save the model by transformers' save_pretrained, in the original layout"
            raise WeightError(f"checkpoint tensor {name} is not part of this model: {remedy}")
        found = tuple(tensor.shape if target.parameter else tensor.reshape(-1).tolist())
        if found not in target.shapes:
            wanted = " or ".join(str(list(shape)) for shape in target.shapes)
            raise WeightError(
                f"checkpoint tensor {name} {'has shape' if target.parameter else 'is'} {list(found)} where config.json "
                f"asks for {wanted}: correct the sizes in config.json or use the checkpoint they belong to"
            )
        if original not in missing:
            raise WeightError(f"checkpoint tensor {name} is stored twice: remove one of the two")
        missing.discard(original)
        if target.part is not None:
            weight, suffix, scheme = target.part
            gathered = parts.setdefault(weight, {})
            gathered[suffix] = tensor
            if len(gathered) < 2:
                continue
            tensor = plain(scheme, parts.pop(weight))
        if target.parameter in parameters:  # else another pipeline stage holds its layer
            parameter = parameters[target.parameter]
            if target.scales is not None and hasattr(parameter, "has_row_scales"):
                tensor = row_scales(target.scales[0], tensor, target.scales[1])
            _load_one(parameter, tensor, target.arguments)
            loaded.add(target.parameter)
    if whole and missing:
        first, more = min(missing), len(missing) - 1
        rest = f" and {more} more" if more else ""
        raise WeightError(
            f"checkpoint tensor {first}{rest} is missing: the checkpoint is incomplete, "
            "or config.json describes another model"
        )
    if parts:
        (weight, gathered), *_ = parts.items()
        raise WeightError(f"{weight} came with {', '.join(gathered)} alone: send values and scales in one call")
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
