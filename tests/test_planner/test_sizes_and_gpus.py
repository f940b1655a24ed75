"""Numbers as people write them, and the machine that is named or found."""

import os
from pathlib import Path

import pytest

from kimi_server import gpus, sizes
from vllm_kimi_linear.config_error import ConfigError
from vllm_kimi_linear.memory import GIB, MIB


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("128K", 131072), ("1M", 1048576), ("1m", 1048576), (" 80g ", 80 * GIB)]
)
def test_sizes(text: str, number: int) -> None:
    assert sizes.parse("--context", text, "128K") == number


@pytest.mark.parametrize("text", ["0", "0K", "", "K", "-1", "1.5M", "1T", "1 M", "one", "\u0661"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        sizes.parse("--context", text, "128K")
    assert str(error.value) == f"--context is {text!r}; give a whole number from 1, such as 128K"


def test_tokens_are_shown_as_they_are_written() -> None:
    assert [sizes.tokens(count) for count in (4096, 131072, 1048576, 2000)] == ["4K", "128K", "1M", "2,000"]


@pytest.mark.parametrize("short", gpus.GPUS)
def test_a_gpu_has_two_names(short: str) -> None:
    name, mib = gpus.GPUS[short]
    one, four = gpus.machine(None, name, None, 1), gpus.machine(None, f"4x{short.lower()}", None, 1)
    assert (one.device, one.name, one.count, one.total) == ("cuda", name, 1, mib * MIB)
    assert (four.name, four.count, four.total) == (name, 4, mib * MIB)
    assert one.usable == int(mib * MIB * gpus.GPU_SHARE)


def test_an_unknown_gpu_needs_its_memory() -> None:
    with pytest.raises(ConfigError, match=r"--gpus is '2xH1000'; give one of A10, .* with --memory 80G"):
        gpus.machine(None, "2xH1000", None, 1)
    machine = gpus.machine(None, "2xH1000", "100G", 1)
    assert (machine.name, machine.count, machine.total) == ("H1000", 2, 100 * GIB)


@pytest.mark.parametrize("text", ["0xH200", "", "x", "4x"])
def test_what_names_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--gpus is ") as error:
        gpus.machine(None, text, None, 1)
    assert ";" in str(error.value)


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi of our own, before any other."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, f"echo 'NVIDIA H200, 143771\nNVIDIA H200, 143771'; echo $@ > {tmp_path}/asked")
    machine = gpus.machine(None, None, None, 1)
    assert (machine.device, machine.name, machine.count, machine.total) == ("cuda", "NVIDIA H200", 2, 143771 * MIB)
    assert "-i" not in (tmp_path / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    gpus.probe()
    assert (tmp_path / "asked").read_text().endswith("-i 0,3\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.probe() == []


def test_unlike_gpus_have_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "echo 'NVIDIA L4, 23034\nNVIDIA H200, 143771'")
    with pytest.raises(ConfigError, match="this machine has NVIDIA H200, NVIDIA L4; name those to use"):
        gpus.machine(None, None, None, 1)


@pytest.mark.parametrize("script", ["exit 9", "exit 0"])
def test_without_a_gpu_it_is_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    answer(tmp_path, monkeypatch, script)
    two = gpus.machine(None, None, None, 2)
    assert (two.device, two.count) == ("cpu", 2)
    assert two.usable == int(two.total * gpus.CPU_SHARE) > 0
    given = gpus.machine(None, None, "256M", 2)
    assert (given.device, given.count, given.usable) == ("cpu", 2, 256 * MIB)
    with pytest.raises(ConfigError, match="--device is cuda and nvidia-smi shows no GPU"):
        gpus.machine("cuda", None, None, 1)


def test_memory_that_is_not_known_has_to_be_given(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    with pytest.raises(ConfigError, match=r"--memory is unset .* give it, such as 16G"):
        gpus.available_memory(file)
    file.write_text("MemTotal:       100 kB\nMemAvailable:    42 kB\n")
    assert gpus.available_memory(file) == 42 * 1024
