"""Folders of offloaded prefixes tell the weights, the dtype of states and the versions of those who wrote them."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.config import OffloadingModelConfig

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches import offloaded_files


@dataclass(frozen=True)
class Offloading:
    """Of vLLM's OffloadingConfig what is read."""

    model: OffloadingModelConfig
    extra_config: dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model-00001.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def configuration(folder: Path, **values: Any) -> Any:
    model = {"model": str(folder), "revision": None, "seed": 0, "quantization": None, "dtype": "bfloat16"}
    hf_config = SimpleNamespace(to_json_string=lambda: values.get("hf_overrides", ""))
    cache = {"mamba_ssm_cache_dtype": "float32"}
    load = {"load_format": "auto", "download_dir": None}
    for part in (model, cache, load):
        part.update({name: value for name, value in values.items() if name in part})
    return SimpleNamespace(
        model_config=SimpleNamespace(
            architecture=values.get("architecture", ARCHITECTURE), hf_config=hf_config, **model
        ),
        cache_config=SimpleNamespace(**cache),
        load_config=SimpleNamespace(**load),
    )


def test_the_same_again(folder: Path) -> None:
    assert offloaded_files.identity(configuration(folder)) == offloaded_files.identity(configuration(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"hf_overrides": "{}"},
        {"mamba_ssm_cache_dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"load_format": "dummy"},
        {"seed": 1},
    ],
)
def test_other_flags(values: dict[str, Any], folder: Path) -> None:
    assert offloaded_files.identity(configuration(folder)) != offloaded_files.identity(configuration(folder, **values))


def test_weights_that_are_not_found() -> None:
    with pytest.raises(ConfigError, match="give the folder of its weights"):
        offloaded_files.identity(configuration(Path("absent/model")))


def test_other_weights_of_the_same_size_at_the_same_path(folder: Path) -> None:
    before = offloaded_files.identity(configuration(folder))
    path = folder / "model-00001.safetensors"
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(1, 1))
    assert offloaded_files.identity(configuration(folder)) != before


def test_a_copy_of_a_hub_s_cache_is_the_same(tmp_path: Path) -> None:
    found: list[str] = []
    for name in ("here", "there"):
        blobs, snapshot = tmp_path / name / "blobs", tmp_path / name / "snapshots/1"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "abc").write_text("{}")
        (snapshot / "config.json").symlink_to(blobs / "abc")
        os.utime(blobs / "abc", ns=(len(found), 1))
        found.append(offloaded_files.identity(configuration(snapshot)))
    assert found[0] == found[1]


def build(vllm_config: Any, root: Path) -> Any:
    original = Offloading(OffloadingModelConfig("kimi", "bfloat16"), {"secondary_tiers": [{"root_dir": str(root)}]})
    return offloaded_files.name_weights(lambda *args: original)(vllm_config, None)


def test_the_name_of_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "info_once", lambda text, *args, **more: said.append(text % args))
    own = offloaded_files.identity(configuration(folder))
    assert build(configuration(folder), tmp_path / "prefixes").model.name == f"kimi_{own}"
    assert build(configuration(folder, architecture="LlamaForCausalLM"), tmp_path / "prefixes").model.name == "kimi"
    assert not said
    for name in (f"kimi_{own}_123", "kimi_0123456789abcdef_456"):
        (tmp_path / "prefixes" / name).mkdir(parents=True)
        (tmp_path / "prefixes" / name / "config.json").write_text("{}")
    build(configuration(folder), tmp_path / "prefixes")
    assert len(said) == 1 and "in 1 folders besides" in said[0]
