"""A checkpoint as compressed-tensors would store it, beside the plain one that it stands for."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT = {"type": "int", "symmetric": True, "dynamic": False}
# What public checkpoints have (docs/guide): name -> format, weights, activations.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8 by channel": ("float-quantized", FP8 | {"strategy": "channel"}, TOKEN),
    "fp8 by block": (
        "float-quantized",
        FP8 | {"strategy": "block", "block_structure": [128, 128]},
        TOKEN | {"strategy": "group", "group_size": 128},
    ),
    "int8": ("int-quantized", INT | {"num_bits": 8, "strategy": "channel"}, TOKEN | {"type": "int"}),
    "int4, groups of 32": ("pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4, groups of 16": ("pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 16}, None),
    "int8, packed": ("pack-quantized", INT | {"num_bits": 8, "strategy": "channel"}, None),
}
EXPERTS_ALONE = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*\.mlp\..*"]


def config_of(kind: str, targets: list[str]) -> dict[str, Any]:
    form, weights, inputs = KINDS[kind]
    return {"targets": targets, "weights": weights, "input_activations": inputs, "format": form}


def write(
    original: Path, folder: Path, groups: Mapping[str, tuple[str, list[str]]], ignore: list[str] | None = None
) -> tuple[Path, Path]:
    """The two folders of a checkpoint: stored, and plain, with the weights that the stored ones stand for.

    groups: name -> (kind, targets), as a config's groups; a target is "Linear" or a pattern. The config keeps the
    words of the library, which also packs the weights.
    """
    ignored = ["lm_head"] if ignore is None else ignore
    stored, plain = folder / "stored", folder / "plain"
    for made in (stored, plain):
        shutil.copytree(original, made, ignore=shutil.ignore_patterns("*.safetensors*"))
    packed, meant = {}, {}
    for name, tensor in load_file(original / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        kind = None if name == layer or tensor.dim() != 2 else _kind(layer, groups, ignored)
        if kind is None:
            packed[name] = meant[name] = tensor
            continue
        form, weights, inputs = KINDS[kind]
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = compressor.compress({"weight": tensor, "weight_scale": _scales(tensor, weights)}, scheme)
        packed |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in state.items()}
        meant[name] = _meant(compressor, state, scheme)
    save_file(packed, stored / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": next(iter(KINDS[kind][0] for kind, _ in groups.values())) if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {name: config_of(kind, targets) for name, (kind, targets) in groups.items()},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
    (stored / "config.json").write_text(json.dumps(config))
    return stored, plain


def _meant(compressor: Any, state: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """In fp32, so that nothing is rounded once more."""
    state = state | {"weight_scale": state["weight_scale"].float()}
    if scheme.weights.strategy == "block":  # the compressor takes such scales for those of groups
        return dequantize(state["weight"], state["weight_scale"], args=scheme.weights, dtype=torch.float32)
    return compressor.decompress(state, scheme)["weight"].float()


def _kind(layer: str, groups: Mapping[str, tuple[str, list[str]]], ignored: list[str]) -> str | None:
    def fits(pattern: str) -> bool:
        return bool(re.match(pattern[3:], layer)) if pattern.startswith("re:") else pattern == layer

    if layer.endswith((".gate", "embed_tokens")) or any(fits(pattern) for pattern in ignored):
        return None
    named = [kind for kind, targets in groups.values() if any(fits(target) for target in targets)]
    return next(iter(named or [kind for kind, targets in groups.values() if "Linear" in targets]), None)


def _scales(weight: torch.Tensor, weights: Mapping[str, Any]) -> torch.Tensor:
    """The largest of what shares a scale becomes the largest that can be stored."""
    most = 448.0 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
    wide = weight.float().abs()
    if weights["strategy"] == "group":
        wide = wide.unflatten(1, (-1, weights["group_size"])).amax(-1)
    elif weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        padded = torch.nn.functional.pad(wide, (0, -wide.shape[1] % columns, 0, -wide.shape[0] % rows))
        wide = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))
    else:
        wide = wide.amax(1, keepdim=True)
    return (wide / most).clamp(min=1e-8).to(torch.bfloat16).to(weight.dtype)
