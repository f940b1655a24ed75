"""A start of `vllm serve` that cannot work ends with one sentence, wherever it stops."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.presets import demo_config
from kimi_demo.server import Server
from tests.support import patience
from tests.support.old_tokenizer import write_old_tokenizer
from tests.support.starts import linear, write_model
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

# Ends of `vllm serve`, each for one place where a start can stop: reading config.json, building the configuration,
# loading the tokenizer, loading the weights, planning the cache.
ENDINGS = {
    "config.json": "layer 3 in both kda_layers and full_attn_layers; keep it in one",
    "flag": "--kv-cache-dtype is fp8; on cpu this model takes",
    "tokenizer": "does not load with transformers",
    "weights": "checkpoint tensor model.norm.weight is missing",
    "cache": "--max-model-len is 1048576; a sequence of that length needs ",
}


@pytest.fixture(scope="module")
def endings(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Exit status and lines of each of ENDINGS, started together to share the cores."""
    folder = tmp_path_factory.mktemp("endings")
    old = write_old_tokenizer(folder / "old")
    starts = {
        "config.json": (write_model(demo_model, linear(full_attn_layers=[3, 4, 8]), folder / "layers"), []),
        "flag": (demo_model, ["--kv-cache-dtype=fp8"]),
        "tokenizer": (write_broken_tokenizer(folder / "tokenizer"), ["--trust-remote-code"]),
        "weights": (write_without(old, "model.norm.weight", folder / "weights"), ["--trust-remote-code"]),
        "cache": (demo_model, ["--max-model-len=1048576", "--dtype=float32"]),
    }
    flags = ["--max-model-len=512", "--kv-cache-memory-bytes=64M"]
    servers = [
        Server(model, [*flags, *more], log_path=folder / f"{name}.log") for name, (model, more) in starts.items()
    ]
    with contextlib.ExitStack() as stack:
        processes = []
        for server in servers:
            log = stack.enter_context(server.log_path.open("wb"))
            environment = {**os.environ, **server.env, "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                server.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            stack.callback(stop, process)
            processes.append(process)
        statuses = [process.wait(patience.SECONDS) for process in processes]
    logs = [server.log.strip().splitlines() for server in servers]
    return dict(zip(starts, zip(statuses, logs, strict=True), strict=True))


def stop(process: subprocess.Popen) -> None:
    """End the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write_broken_tokenizer(folder: Path) -> Path:
    """A checkpoint whose tokenizer imports what no transformers has."""
    write_checkpoint(folder, layers=4, remote_code=True)
    code = folder / "tokenization_kimi.py"
    code.write_text(f"from transformers import bytes_to_words\n{code.read_text()}")
    return folder


def write_without(model: Path, name: str, folder: Path) -> Path:
    """The checkpoint at `model` without the tensor `name`."""
    write_model(model, {}, folder)
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("ending", ["config.json", "flag", "tokenizer"])
def test_serve_ends_with_the_sentence(endings: dict[str, tuple[int, list[str]]], ending: str) -> None:
    status, log = endings[ending]
    assert status != 0
    assert "ConfigError: " in log[-1]
    assert ENDINGS[ending] in log[-1]


def test_a_broken_tokenizer_is_named(endings: dict[str, tuple[int, list[str]]]) -> None:
    last = endings["tokenizer"][1][-1]
    assert "bytes_to_words" in last
    assert "--tokenizer-revision" in last


def test_an_old_tokenizer_ends_no_start(endings: dict[str, tuple[int, list[str]]]) -> None:
    """The start comes as far as the weights, and each process says once what it supplied."""
    said = [line for line in endings["weights"][1] if "bytes_to_unicode" in line]
    assert 1 <= len(said) == len({line.split(" INFO ")[0] for line in said}) <= 2, said


def test_serve_names_the_missing_tensor(endings: dict[str, tuple[int, list[str]]]) -> None:
    status, log = endings["weights"]
    assert status != 0
    assert any("WeightError: " + ENDINGS["weights"] in line for line in log)


def test_serve_says_how_much_cache_is_short(endings: dict[str, tuple[int, list[str]]]) -> None:
    status, log = endings["cache"]
    assert status != 0
    [line, *_] = (line for line in log if "ConfigError: " + ENDINGS["cache"] in line)
    model_sizes = ModelSizes.from_config(demo_config())
    plan = layout.cache_layout(model_sizes, activation_dtype="float32", kv_bytes=64 << 20, prefix_caching=True)
    longest = plan.longest_context(1 << 20)
    assert 0 < longest < 1 << 20
    assert " MiB of cache on each rank, which has 64.0 MiB, " in line
    assert f" short: --max-model-len {longest} fits, or give more with " in line
