"""Whatever nvidia-smi says: GPUs to plan for, or one sentence that says why not and what to do."""

import os
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kimi_server.cli import main
from kimi_server.planner import gpus, nvidia
from vllm_kimi_linear.cache.layout import GIB, MIB
from vllm_kimi_linear.config.errors import ConfigError

CONFIG = str(Path(__file__).parents[3] / "benchmarks" / "config_48b.json")


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`answer(script)`: an nvidia-smi of our own, before any other; returns its folder."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(script: str) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return tmp_path

    return answer


def printing(text: str, status: int = 0) -> str:
    return f"printf %s {shlex.quote(text)}; exit {status}"


def test_gpus_are_probed(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = answer("echo 'NVIDIA H200, 143771\nNVIDIA H200, 143771'; echo $@ >> $(dirname $0)/asked")
    machine = gpus.machine(None, None, None, 1)
    assert (machine.device, machine.name, machine.count, machine.total) == ("cuda", "NVIDIA H200", 2, 143771 * MIB)
    assert "-i" not in (folder / "asked").read_text()
    for visible, asked in (("0,3", "0,3"), (" 1 , GPU-ab-1", "1,GPU-ab-1"), ("0,-1,2", "0"), ("2,,3", "2")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvidia.probe()
        assert (folder / "asked").read_text().endswith(f"-i {asked}\n")


def test_what_a_gpu_computes_is_known_or_asked(answer) -> None:
    """fp8 is offered by it."""
    answer("echo 'NVIDIA H200, 143771'")
    assert gpus.machine(None, None, None, 1).capability == (9, 0)
    answer("case $* in *compute_cap*) echo '8.9\n12.0';; *) echo 'NVIDIA New, 100\nNVIDIA New, 100';; esac")
    assert gpus.machine(None, None, None, 1).capability == (8, 9)
    answer("case $* in *compute_cap*) echo no such field; exit 2;; *) echo 'NVIDIA New, 100';; esac")
    assert gpus.machine(None, None, None, 1).capability is None
    answer("echo 'NVIDIA New, 100'")
    assert gpus.machine(None, None, None, 1).capability is None


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_no_visible_gpu_is_a_cpu(answer, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    answer("echo 'NVIDIA H200, 143771'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.machine(None, None, None, 1).device == "cpu"


def test_no_nvidia_smi_is_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    two = gpus.machine(None, None, None, 2)
    assert (two.device, two.count) == ("cpu", 2)
    assert two.usable == int(two.total * gpus.CPU_SHARE) > 0
    given = gpus.machine(None, None, "256M", 2)
    assert (given.device, given.count, given.usable) == ("cpu", 2, 256 * MIB)
    with pytest.raises(ConfigError, match="--device is cuda and no GPU was found; name some with --gpus"):
        gpus.machine("cuda", None, None, 1)


def test_unlike_gpus_have_to_be_named(answer) -> None:
    answer("echo 'NVIDIA L4, 23034\nNVIDIA H200, 143771'")
    with pytest.raises(ConfigError, match="this machine has NVIDIA H200, NVIDIA L4; name those to use"):
        gpus.machine(None, None, None, 1)


UNSIZED = {"[N/A]": "shares the machine's memory", "[Insufficient Permissions]": "MIG"}
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n"
# what nvidia-smi does -> words of the sentence
FAILURES = {
    "no devices": (printing("No devices were found\n"), ["No devices were found"]),
    "no devices, said by the status too": (printing("No devices were found\n", 6), ["status 6", "No devices were"]),
    "nothing": ("exit 0", ["printed nothing"]),
    "nothing but a status": ("exit 9", ["status 9", "it printed nothing"]),
    "no driver": (printing("NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9), ["couldn't"]),
    "another driver": (printing(MISMATCH, 18), ["status 18", "version mismatch NVML library version"]),
    "on stderr": ("echo 'permission denied' >&2; exit 4", ["status 4", "permission denied"]),
    "a signal": ("kill -9 $$", ["status -9"]),
    "a GPU that is lost": (printing("NVIDIA H200, 143771\nNVIDIA H200, [GPU is lost]\n"), ["[GPU is lost]"]),
    "a heading": (printing("name, memory.total [MiB]\nNVIDIA H200, 143771\n"), ["memory.total [MiB]"]),
    "a warning": (printing("NVIDIA H200, 143771\nWARNING: infoROM is corrupted at gpu 0\n"), ["infoROM"]),
    "no comma": (printing("NVIDIA H200 143771"), ["NVIDIA H200 143771"]),
    "a size that is none": (printing("NVIDIA H200, -5"), ["-5"]),
    "digits without end": (printing("NVIDIA H200, " + "9" * 5000), ["999"]),
    "no UTF-8": (r"printf '\377\376\n'", ["\ufffd"]),
    "control characters": (r"printf '\033[2J\007, 5x'; exit 0", ["\ufffd"]),
    "no program": ("", ["cannot be run"]),
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("memory", [[], ["--memory", "80G"]])
def test_failures_are_said_and_no_cpu_is_planned(answer, capsys, what: str, memory: list[str]) -> None:
    script, words = FAILURES[what]
    folder = answer(script)
    if not script:
        (folder / "nvidia-smi").write_bytes(b"\x7fELF")
    assert main(["plan", CONFIG, *memory]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    [sentence] = error.splitlines()
    assert sentence.startswith("kimi-linear plan: nvidia-smi ")
    assert sentence.endswith("; name the GPUs with --gpus, such as 4xH100-80GB, or plan for a CPU with --device cpu")
    for word in words:
        assert word in sentence
    assert len(sentence) < 450
    for machine in (gpus.machine("cpu", None, "2G", 1), gpus.machine(None, "8xH200", None, 1)):
        assert machine.usable > 0


@pytest.mark.parametrize("shown", UNSIZED)
def test_gpus_without_a_size(answer, shown: str) -> None:
    answer(printing(f"NVIDIA GB10, {shown}\n"))
    with pytest.raises(ConfigError) as error:
        gpus.machine(None, None, None, 1)
    for word in (shown, "NVIDIA GB10", UNSIZED[shown], "--memory 100G", "--gpus 1xGB10 --memory 100G"):
        assert word in str(error.value)
    for machine in (gpus.machine(None, None, "100G", 1), gpus.machine(None, "1xGB10", "100G", 1)):
        assert (machine.device, machine.count, machine.total) == ("cuda", 1, 100 * GIB)


def test_a_divided_gpu_has_to_be_sized(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer('case "$*" in *mig*) echo Enabled;; *) echo "NVIDIA H200, 143771";; esac')
    with pytest.raises(ConfigError, match=r"divided \(MIG\).* --gpus 1xH100-MIG --memory 20G"):
        gpus.machine(None, None, None, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES is 'MIG-1234'.* --memory 20G"):
        gpus.machine(None, None, None, 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    answer('case "$*" in *mig*) echo no such field; exit 2;; *) echo "NVIDIA H200, 143771";; esac')
    assert gpus.machine(None, None, None, 1).count == 1


def test_what_hangs_is_left(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, though its child keeps its output open: that is ended too."""
    monkeypatch.setattr(nvidia, "PATIENCE", 2)
    folder = answer('trap "" TERM; exec 9> "$(dirname $0)/open"; sleep 600 & wait')
    os.mkfifo(folder / "open")
    reader = os.open(folder / "open", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ConfigError, match=r"nvidia-smi did not end within 2 seconds; name the GPUs with --gpus"):
        gpus.machine(None, None, None, 1)
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # comes when the last of them has ended
    os.close(reader)


LINES = st.text() | st.tuples(st.text(), st.integers().map(str) | st.sampled_from([*nvidia.NO_SIZE])).map(", ".join)


@given(LINES)
def test_any_line(line: str) -> None:
    """It is a GPU, or a sentence."""
    try:
        gpu = nvidia._read(line)
    except ConfigError as error:
        assert str(error).isprintable() and "--gpus" in str(error)
    else:
        assert gpu.name and gpu.name.isprintable()
        assert gpu.total is None or gpu.total % MIB == 0 < gpu.total
        assert (gpu.total is None) == (gpu.shown in nvidia.NO_SIZE)


@example("0", "1")
@given(st.text(), st.none() | st.text())
def test_any_flags(named: str, memory: str | None) -> None:
    try:
        machine = gpus.machine("cuda", named, memory, 1)
    except ConfigError as error:
        assert re.match(r"--(gpus|memory) is '|--(gpus|memory) is \"", str(error))
    else:
        assert machine.count > 0 and machine.usable > 0
