"""The demo checkpoint as files: transformers loads every layout, with code of its own too; the same every time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_demo import checkpoint
from kimi_demo.reference import HfReference


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 3},
        {"preset": "all-mla", "layers": 2},
        {"preset": "one-mla", "dtype": "float32"},
        {"preset": "dense"},
        {"layers": 5, "seed": 7},
    ],
)
def test_transformers_loads_every_layout(options: dict[str, Any], ids: list[int], tmp_path: Path):
    checkpoint.write_checkpoint(tmp_path, **options)
    logits = HfReference(tmp_path).logits(ids[:70])
    assert logits.isfinite().all()


def test_shards_hold_the_same_tensors(demo_model: Path, tmp_path: Path):
    from safetensors.torch import load_file

    checkpoint.main(["--out", str(tmp_path), "--shards", "3"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    whole = load_file(demo_model / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())


def test_same_seed_same_bytes(demo_model: Path, tmp_path: Path):
    checkpoint.main(["--out", str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in demo_model.iterdir()}
    assert sum(map(len, written.values())) < 13e6
    checkpoint.main(["--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "model.safetensors").read_bytes() != written["model.safetensors"]


def test_original_dtypes_and_shapes(demo_model: Path):
    from safetensors.torch import load_file

    tensors = load_file(demo_model / "model.safetensors")
    at = "model.layers.0.self_attn"
    assert tensors[f"{at}.A_log"].shape == (1, 1, 4, 1)
    assert tensors[f"{at}.q_conv1d.weight"].shape == (256, 1, 4)
    fp32 = {name.rpartition(".")[2] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias", "e_score_correction_bias"}
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.bfloat16}


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path: Path):
    (tmp_path / "notes.json").write_text("{}")
    checkpoint.write_checkpoint(tmp_path, "dense", shards=2, remote_code=True)
    checkpoint.write_checkpoint(tmp_path, "dense")
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layers", "3"], "--layers is 3"),
        (["--preset", "one-mla", "--layers", "0"], "--layers is 0"),
        (["--shards", "0"], "--shards is 0"),
        (["--shards", "100000"], "--shards is 100000"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_options_that_do_not_fit(options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        checkpoint.main(["--out", str(out), *options])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_remote_code_is_what_auto_map_names(remote_model: Path, ids: list[int], right: torch.Tensor):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(remote_model, trust_remote_code=True)
    assert type(config).__module__.endswith("configuration_kimi")
    assert [config.is_kda_layer(i) for i in range(4)] == [True, True, True, False]
    assert config.num_experts_per_token == 2
    model = AutoModelForCausalLM.from_pretrained(remote_model, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__.endswith("modeling_kimi")
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([ids])).logits[0], right)
    assert not (remote_model / "tokenizer.json").exists()
