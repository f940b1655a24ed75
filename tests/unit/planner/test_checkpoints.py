"""Where the planner finds a config.json, and where it does not look for one."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kimi_server.cli import main
from kimi_server.planner.checkpoints import KNOWN, read_config
from kimi_server.planner.stored import STORED, as_stored
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes, check_device


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that a hub without any of them is asked for."""
    names: list[str] = []

    def download(name: str, file: str) -> str:
        names.append(name)
        raise OSError(f"{name} has no\n{file}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    return names


@pytest.mark.parametrize("name", KNOWN)
def test_known_names_need_no_network(asked: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ModelSizes.from_config(read_config(name)).max_context == 1 << 20
    assert main(["plan", name, "--gpus", "4xH100-80GB"]) == 0
    assert "Chosen: " in capsys.readouterr().out
    assert asked == []


def test_a_folder_comes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(KNOWN))
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text(json.dumps({"mine": True}))
    monkeypatch.chdir(tmp_path)
    assert read_config(name) == {"mine": True}


PATHS = ("/no/such", "./no/such", "../no/such", "~/models/kimi", "kimi", "a/b/c", "models/kimi", "no/config.json")


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_not_there_is_not_looked_up(
    asked: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value).startswith(f"MODEL is {path!r}: no folder or file of that name is here; give a checkpoint")
    assert asked == []


def test_another_name_is_looked_up(asked: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"the hub gives no config.json of it \(some/model has no config.json\); give"
    ):
        read_config("some/model")
    assert asked == ["some/model"]


@pytest.mark.parametrize("weights", STORED)
def test_a_model_is_planned_as_if_it_were_stored_so(weights: str) -> None:
    config = read_config(next(iter(KNOWN)))
    for device in ("cpu", "cuda"):
        check_device(ModelSizes.from_config(as_stored(config, weights)), device)
    with pytest.raises(ConfigError, match=f"--weights is {weights}, and MODEL has a quantization_config of its own"):
        as_stored(as_stored(config, weights), weights)
