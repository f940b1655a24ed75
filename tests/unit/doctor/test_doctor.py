"""`kimi-linear doctor`: what it finds of machines that are not this one, and its exit status."""

import ctypes
import json
import subprocess
from pathlib import Path

import pytest

from kimi_server.cli import main
from kimi_server.doctor import command, install, machine
from kimi_server.doctor.finding import Finding
from kimi_server.planner import gpus as planned
from kimi_server.planner import nvidia
from vllm_kimi_linear.cache.layout import GIB
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.supported import install_check


@pytest.mark.parametrize(
    ("text", "architecture", "level", "said"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "x86_64", "ok", "avx2 avx512f avx512_bf16 amx_bf16"),
        ("flags\t\t: fpu sse4_2\n", "x86_64", "fault", "needs AVX2"),
        ("Features\t: fp asimd bf16\n", "aarch64", "ok", "asimd bf16"),
    ],
)
def test_processor(tmp_path: Path, text: str, architecture: str, level: str, said: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    found = machine.processor(cpuinfo, architecture)
    assert found.level == level and said in found.text


def test_memory_of_a_container(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(str(GIB // 2))
    assert machine.memory(limit).text == "0.50 GiB free, of at most 0.50 GiB in this container"
    limit.write_text("max\n")
    assert "container" not in machine.memory(limit).text


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "probe", lambda: [nvidia.Gpu("NVIDIA H200", 140 * GIB, "143360")] * 2)
    monkeypatch.setattr(nvidia, "capability", lambda: (9, 0))
    assert machine.gpus() == (Finding("ok", "GPUs", "2 x NVIDIA H200 with 140.00 GiB"), True)
    monkeypatch.setattr(nvidia, "capability", lambda: (7, 5))
    found, on_gpu = machine.gpus()
    assert found.level == "fault" and on_gpu
    assert "compute capability 7.5 has no bfloat16; take GPUs of 8.0 or higher" in found.text

    def broken() -> list[nvidia.Gpu]:
        raise ConfigError("nvidia-smi failed")

    monkeypatch.setattr(nvidia, "probe", broken)
    assert machine.gpus() == (Finding("fault", "GPUs", "nvidia-smi failed"), True)


def test_no_compiler_stops_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert [machine.compiler(on_gpu).level for on_gpu in (True, False)] == ["fault", "warning"]
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\necho a compiler 1.2\necho more\n")
    program.chmod(0o755)
    assert machine.compiler(True) == Finding("ok", "compiler", f"{program}: a compiler 1.2")


def test_libnuma(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.libnuma().level == "fault"


def test_faults_of_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_check, "problems", lambda: ["vLLM is not installed: run `make install`."])
    assert [one.level for one in install.software()] == ["ok", "fault"]
    monkeypatch.setattr(install_check, "problems", list)
    assert install_check.SUPPORTED in install.software()[1].text


@pytest.mark.parametrize(
    ("printed", "status", "level", "said"),
    [
        ('["cpu", "C kernels with AVX2"]\n', 0, "ok", "C kernels with AVX2"),
        ('["reference", "the C kernels were not built"]\n', 0, "warning", "because the C kernels were not built"),
        ("", 1, "fault", "libgomp.so.1: cannot open"),
    ],
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, printed: str, status: int, level: str, said: str) -> None:
    done = subprocess.CompletedProcess([], status, printed, "Traceback\nOSError: libgomp.so.1: cannot open\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = install.kernels("cpu")
    assert found.level == level and said in found.text


def test_kernels_of_this_machine() -> None:
    """The question that is put to the kernels is one that they answer."""
    assert install.kernels("cpu").level in ("ok", "warning")


@pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warning", 0), ("fault", 1)])
def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, status: int) -> None:
    found = [Finding("ok", "GPUs", "none"), Finding(level, "kernels", "text")]  # type: ignore[arg-type]
    monkeypatch.setattr(command, "findings", lambda: found)
    assert main(["doctor"]) == status
    assert ("cannot start here: see kernels." in capsys.readouterr().out) == bool(status)
    assert main(["doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out)[1] == {"level": level, "about": "kernels", "text": "text"}


def test_on_a_gpu_the_processor_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def kernels(device: str) -> Finding:
        asked.append(device)
        return Finding("ok", "kernels", "")

    monkeypatch.setattr(machine, "gpus", lambda: (Finding("ok", "GPUs", "1 x NVIDIA H200 with 140 GiB"), True))
    monkeypatch.setattr(machine, "processor", lambda: Finding("fault", "processor", ""))
    monkeypatch.setattr(install, "software", list)
    monkeypatch.setattr(install, "kernels", kernels)
    found = {one.about: one for one in command.findings()}
    assert found["processor"].level == "ok" and asked == ["cuda"] and "libnuma" not in found


@pytest.mark.parametrize(("gpus", "level"), [(8, "ok"), (1, "warning")])
def test_whether_the_48b_fits(monkeypatch: pytest.MonkeyPatch, gpus: int, level: str) -> None:
    monkeypatch.setattr(nvidia, "probe", lambda: [nvidia.Gpu("NVIDIA L40S", 46068 << 20, "46068")] * gpus)
    assert command.model().level == level


def test_why_the_48b_may_use_half_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "probe", list)
    monkeypatch.setattr(planned, "available_memory", lambda: 16 * GIB)
    text = command.model().text
    assert "a CPU that may use 8.00 GiB (half of the 16.00 GiB that are free; the rest is left to the processes" in text
    assert f"`kimi-linear plan {command.MODEL} --context 128K` says what is needed" in text  # of the same length
