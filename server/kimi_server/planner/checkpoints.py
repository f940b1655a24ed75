"""The config.json of a checkpoint: of those that are known by name, of folders and files, and of names on the hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_kimi_linear.config.errors import ConfigError

# Name on the hub -> its config.json, shipped so that it can be planned without a network.
KNOWN = {
    f"moonshotai/Kimi-Linear-48B-A3B-{kind}": Path(__file__).parent / "known" / "Kimi-Linear-48B-A3B-Instruct.json"
    for kind in ("Instruct", "Base")  # of the same sizes
}


def read_config(model: str) -> Mapping[str, Any]:
    """config.json's dictionary of a known name, a folder, a file or a name on the hub; raises ConfigError."""
    path = Path(model)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long, or in a folder that is somebody else's
        raise ConfigError(f"MODEL is {model!r}: {error.strerror}; give a checkpoint's folder, or a name") from None
    if is_folder:
        path = path / "config.json"
    elif not is_file:
        path = KNOWN.get(model) or _download(model)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"MODEL is {model!r}: {path} cannot be read ({error}); give a checkpoint's folder") from None
    if not isinstance(config, dict):
        raise ConfigError(f"MODEL is {model!r}: {path} holds no object; give a checkpoint's folder")
    return config


def _download(name: str) -> Path:
    """config.json of a model on the hub, or of its local copy; what can only be a path is not asked for."""
    here = f"MODEL is {name!r}: no folder or file of that name is here"
    owner, _, model = name.partition("/")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or model.endswith(".json") or Path(owner).is_dir():
        raise ConfigError(f"{here}; give a checkpoint's folder, its config.json, or a name such as {next(iter(KNOWN))}")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{here}, and the hub gives no config.json of it ({reason}); give a checkpoint's folder"
        ) from None
