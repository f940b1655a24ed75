"""The choice of a layout, what is said when nothing fits, and the report."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from kimi_demo.presets import demo_config
from kimi_server.planner.checkpoints import read_config
from kimi_server.planner.gpus import machine
from kimi_server.planner.plan import Choice, Request, choose
from kimi_server.planner.refusal import sentence
from kimi_server.planner.report import report
from kimi_server.planner.sizes import gib
from kimi_server.planner.start import vllm_commands
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.cache.layout import GIB
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
K, M = 1 << 10, 1 << 20


def plan(gpus: str, context: int = M, concurrency: int = 1, config: Any = CONFIG_48B, **more: Any) -> Choice:
    request = Request(config=config, context=context, concurrency=concurrency, dtype="bfloat16", **more)
    return choose(request, machine(None, gpus, None, 1))


def test_layouts_use_all_gpus() -> None:
    choice = plan("4xH100-80GB")
    assert [(each.servers, each.tensor_parallel) for each in choice.layouts] == [(4, 1), (2, 2), (1, 4)]


def test_the_layout_that_holds_most_is_chosen() -> None:
    for gpus in ("4xH100-80GB", "8xH200", "2xB200"):
        for context in (4 * K, 128 * K, M):
            choice = plan(gpus, context)
            assert choice.best.sequences(context) == max(each.sequences(context) for each in choice.layouts)


def test_replicas_beat_tensor_parallelism_where_weights_leave_room() -> None:
    """On eight H200 the latent KV, which every rank holds, counts for more than the weights."""
    million = plan("8xH200", concurrency=20)
    assert (million.best.servers, million.best.tensor_parallel) == (4, 2)
    assert million.per_server == 5
    _, here, there, _ = (each.sequences(M) for each in million.layouts)
    assert f"servers of 4 ranks would hold {there} of 1M, the chosen layout {here}." in report(million)
    assert here > there
    assert [line.split()[0] for line in vllm_commands(million, "m", "f.yaml")] == [
        f"CUDA_VISIBLE_DEVICES={2 * i},{2 * i + 1}" for i in range(4)
    ]


def test_tensor_parallelism_beats_replicas_where_weights_do_not() -> None:
    small = plan("4xH100-80GB", concurrency=5)
    assert (small.best.servers, small.best.tensor_parallel) == (1, 4)
    _, there, here = (each.sequences(M) for each in small.layouts)
    assert f"More replicas: 2 servers of 2 ranks would hold {there} of 1M, the chosen layout {here}." in report(small)
    assert here > there


def test_no_layout_that_the_start_refuses() -> None:
    """Three ranks cannot share 32 heads: three GPUs are three servers, or one of two."""
    choice = plan("3xH200")
    assert [(each.servers, each.tensor_parallel) for each in choice.layouts] == [(3, 1), (1, 2)]
    with pytest.raises(ConfigError, match="num_heads is 32; --tensor-parallel-size 3 must divide it"):
        plan("3xH200", tensor_parallel=3)


def test_three_gpus_use_two_and_say_so() -> None:
    three, two = plan("3xH100-80GB"), plan("2xH100-80GB")
    assert (three.best.servers, three.best.tensor_parallel) == (1, 2)
    assert three.best.sequences(M) == two.best.sequences(M)
    assert "2 of the 3 GPUs are used: 3 ranks cannot divide the model's 32 heads evenly." in report(three)
    assert "GPUs are used" not in report(two)
    [command] = vllm_commands(three, "m", "f.yaml")
    assert command.startswith("CUDA_VISIBLE_DEVICES=0,1 ")


def test_a_tie_gives_its_reason() -> None:
    tied = plan("4xH100-80GB", 700 * K)
    _, replicas, chosen = tied.layouts
    assert tied.best is chosen
    assert replicas.sequences(700 * K) == chosen.sequences(700 * K) == 8
    cache = f"{gib(chosen.forecast.cache)}, not {gib(replicas.forecast.cache)}"
    assert (
        "More replicas: 2 servers of 2 ranks would hold 8 of 700K, the chosen layout 8. The chosen one leaves each "
        f"server more cache: {cache}."
    ) in report(tied)
    assert "The chosen one" not in report(plan("4xH100-80GB"))


def test_among_equals_no_gpu_is_left_idle() -> None:
    tied = plan("3xH200")
    replicas, pair = tied.layouts
    assert tied.best is replicas
    assert replicas.sequences(M) == pair.sequences(M)
    assert "The chosen one uses 3 GPUs, not 2." in report(tied)


def test_one_server_leaves_gpus_idle_rather_than_start_replicas() -> None:
    choice = plan("3xH200", 128 * K, one_server=True)
    assert (choice.best.servers, choice.best.tensor_parallel) == (1, 2)
    assert "To have them, use `kimi-linear plan` and the gateway." in report(choice)
    assert choice.layouts[0].sequences(128 * K) > choice.best.sequences(128 * K)


def test_decode_context_parallelism_is_named_and_has_to_be_asked_for() -> None:
    plain, spread = plan("4xH100-80GB"), plan("4xH100-80GB", context_parallel=4)
    held = spread.best.sequences(M)
    assert held > plain.best.sequences(M)
    assert f"--decode-context-parallel 4 would hold {held} of 1M" in report(plain)
    assert "decode-context-parallel-size" not in report(plain)
    assert "decode-context-parallel-size: 4" in report(spread)
    assert {each.tensor_parallel for each in spread.layouts} == {4}
    short = plan("4xH100-80GB", 4096, context_parallel=4).best.sequences(4096)  # here the states weigh more
    assert f"--decode-context-parallel 4 would hold {short:,} of 4K" in report(plan("4xH100-80GB", 4096))
    with pytest.raises(ConfigError, match="--decode-context-parallel is 3"):
        plan("4xH100-80GB", context_parallel=3)


def test_an_impossible_request_says_what_is_short_and_by_how_much() -> None:
    text = sentence(plan("4xH100-80GB", concurrency=8))
    assert text.startswith(
        "8 documents of 1M do not fit on 4 x H100-80GB, 5 do: each rank of 1 server of 4 ranks needs "
    )
    needed, held, short = (float(each) for each in re.findall(r"([\d.]+) GiB", text))
    assert short == pytest.approx(needed - held, abs=0.02)
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    one = layout.cache_layout(
        model_sizes, activation_dtype="bfloat16", kv_bytes=0, tensor_parallel=4, prefix_caching=True
    ).bytes_per_sequence(M)
    assert needed == pytest.approx(8 * one / GIB, abs=0.03)
    assert "\n" not in text
    # Every remedy is one.
    remedies = {name: int(value) for name, value in re.findall(r"--([a-z-]+) (\d+)", text)}
    fewer, shorter, spread = (remedies[name] for name in ("concurrency", "context", "decode-context-parallel"))
    assert plan("4xH100-80GB", concurrency=fewer).fits
    assert plan("4xH100-80GB", shorter, concurrency=8).fits
    assert plan("4xH100-80GB", concurrency=8, context_parallel=spread).fits
    for context, concurrency in ((M, fewer + 1), (shorter + 1, 8)):
        assert not plan("4xH100-80GB", context, concurrency).fits


def test_weights_that_do_not_fit_are_named() -> None:
    text = sentence(plan("1xH100-80GB"))
    assert "for weights and activations alone" in text
    needed, held, short = (float(each) for each in re.findall(r"([\d.]+) GiB", text))
    assert needed > 91 > held
    assert short > needed - held  # the cache, too


def test_what_is_asked_fits_in_memory() -> None:
    for gpus, context, concurrency in (("4xH100-80GB", M, 5), ("8xH200", 128 * K, 290), ("1xB200", M, 4)):
        choice = plan(gpus, context, concurrency)
        assert choice.fits
        held = choice.best.forecast
        assert held.shortage(choice.per_server, context) == 0
        assert held.weights + held.activations + held.runtime + held.cache == held.memory


def test_rows_of_the_memory_table_add_up() -> None:
    text = report(plan("4xH100-80GB", concurrency=4))
    title, *lines = text.split("\n\n")[1].splitlines()
    assert title == "Memory of a server with 4 documents of 1M, GiB"
    assert lines[0].split() == ["rank", "0", "rank", "1", "rank", "2", "rank", "3"]
    rows = [[float(cell) for cell in line.split()[-4:]] for line in lines[1:]]
    for rank in range(4):
        *parts, whole = (row[rank] for row in rows)
        assert sum(parts) == pytest.approx(whole, abs=0.005)


def test_lengths_beyond_the_models_own_are_not_shown() -> None:
    short = demo_config() | {"model_max_length": 8192}
    assert "128K" not in report(plan("1xH200", 8192, config=short))
    with pytest.raises(ConfigError, match="--context is 16,384; the model's longest is 8,192"):
        plan("1xH200", 16384, config=short)


# Arguments of `kimi-linear plan`, and what the sentence has in it.
REFUSED = {
    "context": (["--context", "0"], "--context is '0'"),
    "concurrency": (["--concurrency", "many"], "--concurrency is 'many'"),
    "GPU": (["--gpus", "2xH1000"], "--gpus is '2xH1000'"),
    "device": (["--gpus", "H200", "--device", "cpu"], "--gpus is 'H200' with --device cpu"),
    "memory": (["--memory", "lots"], "--memory is 'lots'"),
    "dtype": (["--gpus", "H200", "--dtype", "float16"], "--dtype is float16"),
    "fp32 on a GPU": (["--gpus", "H200", "--dtype", "float32"], "--dtype is float32"),
    "fp8 cache": (["--gpus", "H200", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype is fp8"),
    "bf16 state on a CPU": (["--device", "cpu", "--state-dtype", "bfloat16"], "--state-dtype is bfloat16"),
    "ranks": (["--gpus", "4xH200", "--tensor-parallel", "8"], "--tensor-parallel is 8; give at most"),
    "ranks that do not divide": (["--gpus", "4xH200", "--tensor-parallel", "3"], "--tensor-parallel-size 3"),
    "an old GPU": (["--gpus", "T4"], "T4 has compute capability 7.5"),
    "fp8 on Ampere": (["--gpus", "A100-80GB", "--weights", "fp8"], "fp8, which needs compute capability 8.9"),
    "ranks of a CPU": (["--device", "cpu", "--tensor-parallel", "3"], "--tensor-parallel-size 3"),
    "spread on a CPU": (["--device", "cpu", "--decode-context-parallel", "2"], "--decode-context-parallel is 2"),
    "file": (["--gpus", "4xH200", "--out", "plan.json"], "--out is 'plan.json'"),
    "folder": (["--gpus", "4xH200", "--out", "no/such/folder/plan.yaml"], "--out is 'no/such/folder/plan.yaml'"),
}


def kimi_linear(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimi_server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(CONFIG_48B))
    return file


@pytest.mark.parametrize("error", [OSError(36, "File name too long"), PermissionError(13, "Permission denied")])
def test_a_path_that_cannot_be_looked_at_gets_one_sentence(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setattr(Path, "is_dir", Mock(side_effect=error))
    with pytest.raises(ConfigError, match=f"MODEL is 'some/model': {error.strerror}; give"):
        read_config("some/model")


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_sentence(config: Path, case: str) -> None:
    arguments, said = REFUSED[case]
    done = kimi_linear("plan", str(config), *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("kimi-linear plan: ")
    assert said in line
    assert ";" in line, "no remedy"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"model_type": "kimi_linear"}', '{"architectures": ["Other"]}']
)
def test_a_config_that_is_none_gets_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    done = kimi_linear("plan", str(tmp_path), "--gpus", "4xH200")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert ";" in line


def test_the_command_plans_a_file_and_a_folder(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.yaml"
    for model, named in ((config, False), (config.parent, True)):
        done = kimi_linear("plan", str(model), "--gpus", "4xH100-80GB", "--concurrency", "5", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert f"--config {out} --trust-remote-code --port 8000" in done.stdout
        assert (f'model: "{model}"' in out.read_text()) == named  # a bare config cannot be served
        assert ("vllm serve MODEL" in done.stdout) != named


def test_nothing_follows_a_plan(config: Path) -> None:
    done = kimi_linear("plan", str(config), "--gpus", "4xH200", "--", "--port", "9")
    assert done.returncode == 2
    assert "plan takes nothing after --; remove --port 9" in done.stderr
