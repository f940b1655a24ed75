"""Keep offloaded prefixes of other weights, other states and other versions apart from ours."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import try_to_load_from_cache
from vllm.config import ModelConfig, VllmConfig

from vllm_kimi_linear import ARCHITECTURE, __version__
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

WEIGHTS = ("config.json", "*.safetensors", "*.bin")


def identity(vllm_config: VllmConfig) -> str:
    """Sixteen hex digits that are others where a prefix's latents or states could be."""
    model, cache, load = vllm_config.model_config, vllm_config.cache_config, vllm_config.load_config
    said = [
        [__version__, vllm.__version__, torch.__version__],
        weights(model, load.download_dir),
        model.hf_config.to_json_string(),
        [str(load.load_format), model.seed, model.quantization, str(model.dtype), cache.mamba_ssm_cache_dtype],
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def weights(model: ModelConfig, cache_dir: str | None) -> list[list[str]]:
    """Each file's name and what tells its content: in a hub's cache the content's hash, else size and time.

    Raises ConfigError where no file is found, for then nothing tells whose prefixes they are.
    """
    folder = Path(model.model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model.model, "config.json", cache_dir=cache_dir, revision=model.revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    found = []
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        content, info = path.resolve(), path.stat()
        told = content.name if content.parent.name == "blobs" else f"{info.st_size} {info.st_mtime_ns}"
        found.append([path.name, told])
    if not found:
        raise ConfigError(f"--model is {model.model}; offloading found no file of it, give the folder of its weights")
    return found


def name_weights(original: Function) -> Function:
    def build_offloading_config(vllm_config: Any, kv_cache_config: Any) -> Any:
        config = original(vllm_config, kv_cache_config)
        if vllm_config.model_config.architecture != ARCHITECTURE:
            return config
        own = identity(vllm_config)
        for tier in config.extra_config.get("secondary_tiers", ()):
            say_others(Path(tier.get("root_dir", "")), own)
        return replace(config, model=replace(config.model, name=f"{config.model.name}_{own}"))

    return build_offloading_config


def say_others(root: Path, own: str) -> None:
    found = [path for path in root.glob("*/config.json") if own not in path.parent.name]
    if found:
        logger.info_once(
            "Kimi Linear: %s holds prefixes in %d folders besides; those are of other weights, flags or versions and "
            "are not read.",
            root,
            len(found),
            scope="local",
        )


PATCH = Patch(
    symptom="With a file tier of the OffloadingConnector a server goes on from prefixes that other weights at the same "
    "path, or states of another dtype, have left there.",
    cause="`FileMapper` names a folder by the model's path, its dtype and the layout of its blocks.",
    remove_when="the folder's name tells the weights and the dtype of states.",
    hooks=(
        Hook(
            "vllm.distributed.kv_transfer.kv_connector.v1.offloading.config:build_offloading_config",
            "vllm_config kv_cache_config",
            name_weights,
        ),
    ),
)
