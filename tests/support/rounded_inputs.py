"""What a checkpoint with fp8 activations asks of any implementation: inputs of its products, rounded as they come."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(x: Tensor, group: int | None) -> Tensor:
    """x to fp8 and back, with a scale for each token, or for each `group` channels of one."""
    wide = x.float() if group is None else x.float().unflatten(-1, (-1, min(group, x.shape[-1])))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x).to(x.dtype)


class RoundedInputs(TorchFunctionMode):
    """While it is entered, products with the weights of `model` whose names fit `pattern` round their inputs."""

    def __init__(self, model: Any, pattern: str, group: int | None = None) -> None:
        super().__init__()
        model.set_experts_implementation("eager")  # products of one expert each, as torch's own `linear`
        self.group = group
        self.names = {
            storage(parameter): name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and re.search(pattern, name)
        }
        self.met = set[str]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is linear and (name := self.names.get(storage(args[1]))):
            self.met.add(name)
            args = rounded(args[0], self.group), *args[1:]
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
