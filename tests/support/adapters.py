"""LoRA adapters as PEFT saves them, trained on transformers' own model; here with random matrices."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 12
PREFIX = "base_model.model."  # of every name in an adapter


def modules(model: Any, parts: Iterable[str]) -> list[str]:
    """Names of the linear layers of a model of transformers' that end so, such as "self_attn.q_proj"."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if name.endswith(tuple(f".{part}" for part in parts))]


def write(folder: Path, model: Any, names: Iterable[str], *, seed: int = 0, size: float = 0.3) -> Path:
    """An adapter of these modules of `model`; `size`: how large what it adds is, of the weights' own size."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        a, b = torch.randn(RANK, columns, generator=random), torch.randn(rows, RANK, generator=random)
        b *= size * weight.float().std().item() * RANK**0.5 / ALPHA
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    return save(folder, tensors)


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def merged(model: Any, folder: Path | None) -> Iterator[None]:
    """`model` with an adapter merged into its weights: W + alpha / r B A. None leaves it as it is."""
    before = {}
    if folder is not None:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            weight = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight")).weight
            before[weight] = weight.data
            added = tensors[name.replace(".lora_A.", ".lora_B.")] @ tensors[name]
            added *= config["lora_alpha"] / config["r"]
            weight.data = (weight.data.float() + added.to(weight.device)).to(weight.dtype)
    try:
        yield
    finally:
        for weight, data in before.items():
            weight.data = data
