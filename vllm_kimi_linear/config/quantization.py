"""How a quantised checkpoint stores its linear layers, from config.json's quantization_config. Standard library only.

Read are checkpoints of compressed-tensors, by the names and words that its own documentation has.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_kimi_linear.config.errors import ConfigError

FIELD = "quantization_config"
LINEAR = "Linear"  # the class that a target names for every linear layer
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """Of one weight [N, K]. `group`: columns that share a scale, None for a whole row; `block`: rows and columns."""

    form: str  # "fp8" (e4m3), "int8", or integers packed into int32: "packed4", "packed8"
    group: int | None = None
    block: tuple[int, int] | None = None

    @property
    def packed(self) -> int:
        """Elements in one that is stored."""
        return {"packed4": 8, "packed8": 4}.get(self.form, 1)

    @property
    def values(self) -> str:
        """What the tensor of a weight's values is called."""
        return "weight" if self.packed == 1 else "weight_packed"

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, int]]:
        """What a checkpoint stores in place of `weight` [rows, columns]: suffix -> (shape, bytes of one).

        Raises ConfigError where the scheme does not divide the weight.
        """
        scales = (rows, 1)
        if self.group:
            if columns % self.group:
                raise ConfigError(f"{FIELD} has groups of {self.group}, which do not divide a row of {columns}")
            scales = (rows, columns // self.group)
        if self.block:
            scales = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        if columns % self.packed:
            raise ConfigError(f"{FIELD} packs {self.packed} elements in one, which do not divide a row of {columns}")
        stored = (rows, columns // self.packed)
        if self.packed == 1:
            return {self.values: (stored, 1), "weight_scale": (scales, 4)}
        return {self.values: (stored, 4), "weight_scale": (scales, 2), "weight_shape": ((2,), 8)}


@dataclass(frozen=True)
class Quantization:
    """Which layers are stored how: the first of `targets` that a layer's name, then its class, fits."""

    targets: tuple[tuple[str, Scheme], ...]
    ignore: tuple[str, ...] = field(default=())

    def target(self, layer: str) -> str | None:
        """The target that the linear layer of this name in the checkpoint fits; None where it is stored as it is."""
        if any(_names(pattern, layer) for pattern in self.ignore):
            return None
        named = [pattern for pattern, _ in self.targets if _names(pattern, layer) or pattern == LINEAR]
        return min(named, key=lambda pattern: pattern == LINEAR, default=None)

    def scheme(self, layer: str) -> Scheme | None:
        """How it is stored."""
        target = self.target(layer)
        return next((scheme for pattern, scheme in self.targets if pattern == target), None)

    @classmethod
    def from_config(cls, found: Any) -> "Quantization":
        """Raises ConfigError, naming the field and what to use, for what is not served."""
        if not isinstance(found, Mapping) or found.get("quant_method") != "compressed-tensors":
            method = found.get("quant_method") if isinstance(found, Mapping) else found
            raise ConfigError(
                f"{FIELD} is of quant_method {method!r}; give a compressed-tensors checkpoint as llm-compressor makes "
                "it (FP8 by channel or block, int8, or 4-bit integers), or one in bfloat16"
            )
        for name in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            if found.get(name):
                raise ConfigError(f"{FIELD}.{name} is {found[name]!r}; that is not implemented for this model")
        groups, ignore = found.get("config_groups"), found.get("ignore") or []
        if not isinstance(groups, Mapping) or not groups:
            raise ConfigError(f"{FIELD}.config_groups is {groups!r}; give at least one group of layers")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ConfigError(f"{FIELD}.ignore is {ignore!r}; give a list of layers' names")
        targets = [pair for name, group in groups.items() for pair in _group(name, group, found.get("format"))]
        for pattern in (*ignore, *(pattern for pattern, _ in targets)):
            _check_pattern(pattern)
        return cls(tuple(targets), tuple(ignore))


def _names(pattern: str, layer: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern == layer


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        raise ConfigError(f"{FIELD} has the pattern {pattern!r}, which is no regular expression: {error}") from None


def _group(name: str, group: Any, default_format: Any) -> Iterator[tuple[str, Scheme]]:
    at = f"{FIELD}.config_groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ConfigError(f"{at} is {group!r}; give its targets and weights")
    targets, inputs = group.get("targets"), group.get("input_activations")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"{at}.targets is {targets!r}; give a list of layers' names, or ['{LINEAR}']")
    if inputs is not None and not (isinstance(inputs, Mapping) and inputs.get("dynamic") is True):
        raise ConfigError(f"{at}.input_activations is {inputs!r}; only dynamic ones (dynamic: true) are implemented")
    if group.get("output_activations"):
        raise ConfigError(f"{at}.output_activations is {group['output_activations']!r}; that is not implemented")
    scheme = _scheme(f"{at}.weights", group["weights"], group.get("format") or default_format)
    for target in targets:
        yield target, scheme


def _scheme(at: str, weights: Mapping[str, Any], stored: Any) -> Scheme:
    for key, value in {"symmetric": True, "dynamic": False}.items():
        if weights.get(key, value) is not value:
            raise ConfigError(f"{at}.{key} is {weights[key]!r}; only {str(value).lower()} is implemented")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise ConfigError(f"{at}.actorder is {weights['actorder']!r}; only columns in original order are implemented")
    kind = weights.get("type"), weights.get("num_bits"), stored
    forms = {
        ("float", 8, "float-quantized"): "fp8",
        ("int", 8, "int-quantized"): "int8",
        ("int", 4, "pack-quantized"): "packed4",
        ("int", 8, "pack-quantized"): "packed8",
    }
    if kind not in forms:
        known = "; ".join(f"{kind} of {bits} bits, {stored}" for kind, bits, stored in forms)
        raise ConfigError(f"{at} is {kind[0]} of {kind[1]} bits, {kind[2]}; implemented are {known}")
    strategy = weights.get("strategy")
    if strategy == "channel":
        return Scheme(forms[kind])
    if strategy == "group" and forms[kind] != "fp8":
        group = weights.get("group_size")
        if not isinstance(group, int) or isinstance(group, bool) or group < 16 or group & (group - 1):
            raise ConfigError(f"{at}.group_size is {group!r}; give a power of two from 16")
        return Scheme(forms[kind], group=group)
    if strategy == "block" and forms[kind] == "fp8":
        block = weights.get("block_structure")
        if block != [128, 128]:
            raise ConfigError(f"{at}.block_structure is {block!r}; give [128, 128]")
        return Scheme(forms[kind], block=(128, 128))
    raise ConfigError(f"{at}.strategy is {strategy!r}; give 'channel', or for integers 'group', or for floats 'block'")
