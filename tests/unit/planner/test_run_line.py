"""What a plan says to run: it can be run, and has every flag of the request."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_demo.presets import demo_config
from kimi_server.cli import main
from kimi_server.planner import nvidia
from kimi_server.planner.checkpoints import KNOWN, read_config
from kimi_server.planner.stored import GUIDE, STORED

MODEL = next(iter(KNOWN))
SERVE = f"kimi-linear serve {MODEL}"
TRUST = "-- --trust-remote-code"


@pytest.mark.parametrize("weights", STORED)
def test_what_is_run_for_other_weights_can_be_run(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fp8 is made by the server, and of int4 the guide makes the folder that is named."""
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(read_config(MODEL)))
    out = tmp_path / "serve.yaml"
    asked = ["plan", str(config.parent), "--gpus", "1xH100", "--weights", weights]
    assert main([*asked, "--brief"]) == 0
    line = capsys.readouterr().out
    assert main([*asked, "--brief", "--out", str(out)]) == 0
    online = weights == "fp8"
    model = "model" if online else "model-int4"
    assert f"kimi-linear serve {model if not online else config.parent} " in line
    assert ("--weights fp8" in line, "with an int4 checkpoint" in line) == (online, not online)
    assert ('quantization: "fp8_per_channel"' in out.read_text()) == online
    assert main(["serve", str(config.parent), "--device", "cpu", "--memory", "80G", "--weights", weights]) == 1
    assert f"--weights is {weights}, which takes a checkpoint; give its folder as MODEL" in capsys.readouterr().err


def test_serve_quantises_as_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execvp", lambda _, command: started.extend(command))
    out = tmp_path / "serve.yaml"
    main(["serve", MODEL, "--gpus", "1xH100", "--context", "128K", "--weights", "fp8", "--out", str(out)])
    assert capsys.readouterr().out.startswith("Yes: 18 documents of 128K at once.")
    assert started[-4:] == ["serve", MODEL, "--config", str(out)]
    assert 'quantization: "fp8_per_channel"' in out.read_text()


def test_a_number_of_this_machines_gpus_is_run_on_as_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvidia, "probe", lambda: [nvidia.Gpu("NVIDIA H200", 143771 << 20, "143771")] * 4)
    assert main(["plan", MODEL, "--gpus", "1", "--context", "128K", "--brief"]) == 0
    line = f"Yes: 27 documents of 128K at once. Run: {SERVE} --gpus 1 --context 128K {TRUST}\n"
    assert capsys.readouterr().out == line


def test_the_guide_makes_the_folder_that_is_named() -> None:
    """Its recipe stores weights as the plan counts them."""
    page = (Path(__file__).parents[3] / GUIDE).read_text()
    block = page[(start := page.index("from compressed_tensors")) : page.index("```", start)]
    asked: dict[str, Any] = {}
    fakes: dict[str, Any] = {
        "llmcompressor": SimpleNamespace(model_free_ptq=lambda **words: asked.update(words)),
        "compressed_tensors.quantization": SimpleNamespace(QuantizationScheme=dict),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setitem(sys.modules, name, fake)
        exec(block, {})
    [group] = STORED["int4"]["config_groups"].values()
    scheme = asked["scheme"]
    assert asked["model_stub"] == MODEL and asked["save_directory"] == f"{MODEL.partition('/')[2]}-int4"
    assert scheme["weights"].items() <= group["weights"].items()
    assert scheme["targets"] == group["targets"] and scheme["format"] == group["format"]
    assert {*STORED["int4"]["ignore"]} <= {*asked["ignore"]}


def test_what_is_run_is_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """The command has every flag of the request, for its own share of the machine."""
    flags = ["--dtype", "bfloat16", "--state-dtype", "bfloat16", "--concurrency", "9", "--decode-context-parallel", "2"]
    assert main(["plan", MODEL, "--gpus", "8xH200", "--context", "5000", *flags, "--brief"]) == 0
    line, *commands = capsys.readouterr().out.splitlines()
    assert " documents of 5,000 tokens at once, by 4 servers of 2 ranks." in line
    assert commands[3] == (
        f"  CUDA_VISIBLE_DEVICES=6,7 {SERVE} --tensor-parallel 2 --context 5000 --decode-context-parallel 2 "
        "--dtype bfloat16 --state-dtype bfloat16 --concurrency 3 -- --trust-remote-code --port 8003"
    )


def test_a_model_that_reads_less_is_planned_for_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(demo_config() | {"model_max_length": 5000}))
    assert main(["plan", str(tmp_path), "--gpus", "L4", "--brief"]) == 0
    assert f" documents of 5,000 tokens at once. Run: kimi-linear serve {tmp_path} --context 5000" in (
        capsys.readouterr().out
    )
