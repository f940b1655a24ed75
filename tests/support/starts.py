"""Configurations of the demo checkpoint that vLLM builds, or refuses to build."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.own_process import in_own_process

REMOVED = object()  # a key that the config.json of the case lacks

# What is wrong -> (changes to config.json, engine arguments, the field and the value that the sentence names)
Refused = dict[str, tuple[dict[str, Any], dict[str, Any], str, str]]
Accepted = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def linear(**changes: Any) -> dict[str, Any]:
    """Changes inside linear_attn_config of the demo: 8 layers, MLA at 4 and 8."""
    fields = {
        "full_attn_layers": [4, 8],
        "head_dim": 64,
        "kda_layers": [1, 2, 3, 5, 6, 7],
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    }
    return {"linear_attn_config": {k: v for k, v in (fields | changes).items() if v is not REMOVED}}


def write_model(model: Path, changes: dict[str, Any], folder: Path) -> Path:
    """The demo checkpoint at `model` with changes to its config.json."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def _build(cases: dict[str, tuple[dict[str, Any], str]]) -> dict[str, list[str]]:
    """Case -> [class, message] of what building its configuration raises, or [] where it is accepted."""
    from vllm.engine.arg_utils import EngineArgs

    results: dict[str, list[str]] = {}
    # vLLM tries twice to read a config.json that it cannot, with a pause between.
    with mock.patch("time.sleep"):
        for name, (arguments, model) in cases.items():
            try:
                EngineArgs(model=model, **{"max_model_len": 8192} | arguments).create_engine_config()
                results[name] = []
            except Exception as error:
                results[name] = [type(error).__name__, str(error)]
    return results


def outcomes(model: Path, cases: Accepted, folder: Path) -> dict[str, list[str]]:
    """Case -> [class, message] of what its changes and arguments raise, or [] where they are accepted."""
    written = {
        name: (arguments, str(write_model(model, changes, folder / str(index))))
        for index, (name, (changes, arguments)) in enumerate(cases.items())
    }
    return in_own_process(_build, written)


def check_refused(outcome: list[str], field: str, value: str) -> None:
    """One sentence: the field, its value, the remedy."""
    assert outcome, "accepted"
    kind, message = outcome
    assert kind == "ConfigError", message
    assert field in message
    assert value in message
    what, _, remedy = message.partition(";")
    assert what and remedy.strip(), "no remedy"
    assert "\n" not in message
