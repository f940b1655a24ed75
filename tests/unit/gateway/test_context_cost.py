"""What a context costs by a model's config.json, and what is said of one that tells nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.presets import demo_config
from kimi_server.gateway.config.settings import SettingsError
from kimi_server.gateway.context_cost import ContextCost, read_cost

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
DEMO = demo_config()


def test_the_cost_of_the_48b_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG_48B))
    assert read_cost(path) == ContextCost(43_417_600, 8064)


ODD: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "Expecting"),
    "no UTF-8": ("\x80", "codec"),
    "a list": ("[]", "no object"),
    "a text": ('"x"', "no object"),
    "null": ("null", "no object"),
    "nested deeply": ("[" * 100_000, "recursion"),
    "another model": (json.dumps({"model_type": "llama"}), "model_type is 'llama'"),
}


def changed(**fields: Any) -> str:
    return json.dumps(DEMO | fields)


ODD |= {
    "a dtype that is a list": (changed(dtype=["bfloat16"]), "dtype is ['bfloat16']: use one of float32"),
    "an unknown dtype": (changed(dtype="int4"), "dtype is 'int4': use one of float32"),
    "architectures that are a number": (changed(architectures=5), "architectures is 5; it must be"),
    "layer types that are a number": (changed(layer_types=5, mlp_layer_types=5), "layer_types is 5; give the list"),
    "a size beyond floats": (changed(kv_lora_rank=10**400), "too large"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_config_gets_one_sentence(tmp_path: Path, case: str) -> None:
    text, words = ODD[case]
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError) as error:
        read_cost(path)
    message = str(error.value)
    assert message.startswith(f"model_config {path}") and "\n" not in message
    assert words in message
