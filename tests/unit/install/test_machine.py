"""deploy/install/machine.py: the device, and the tools that are missing."""

import os
from pathlib import Path

import pytest

from deploy.install import machine
from deploy.install.__main__ import child_environment
from deploy.install.steps import Failed


@pytest.mark.parametrize(
    ("asked", "installed", "gpu", "device"),
    [
        ("", "", False, "cpu"),
        ("", "", True, "cuda"),
        ("cpu", "", True, "cpu"),
        ("cuda", "", False, "cuda"),
        ("", "cpu", True, "cpu"),
        ("cuda", "cpu", False, "cuda"),
    ],
)
def test_device(asked: str, installed: str, gpu: bool, device: str) -> None:
    assert machine.choose_device(asked, installed, lambda: gpu) == device


def test_unknown_device_is_refused() -> None:
    with pytest.raises(Failed, match=r"^DEVICE=tpu is not a device: use DEVICE=cpu or DEVICE=cuda"):
        machine.choose_device("tpu", "", lambda: False)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)

    def no_library(name: str) -> None:
        raise OSError(name)

    def missing(device: str, **lacking) -> list[str]:
        present = {"find_module": bool, "find_program": bool, "load_library": bool}
        return machine.missing_tools(device, **(present | lacking))

    assert missing("cpu") == []
    (venv,) = missing("cpu", find_module=lambda name: name != "ensurepip")
    (compiler,) = missing("cpu", find_program=lambda name: name != "gcc")
    (numa,) = missing("cpu", load_library=no_library)
    assert ("python3-venv" in venv, "apt install gcc" in compiler, "libnuma1" in numa) == (True, True, True)
    assert missing("cuda", load_library=no_library) == []


@pytest.mark.parametrize(
    ("cc", "asked"),
    [
        (None, "gcc"),
        ("", "gcc"),
        ("  ", "gcc"),
        ("ccache gcc", "ccache"),
        ("gcc -m64 -O2", "gcc"),
        ("'/opt/my tools/gcc' -O2", "/opt/my tools/gcc"),
    ],
)
def test_the_compiler_is_the_first_word_of_cc(monkeypatch: pytest.MonkeyPatch, cc: str | None, asked: str) -> None:
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    looked_for: list[str] = []

    def find(name: str) -> bool:
        looked_for.append(name)
        return True

    assert machine.missing_tools("cuda", find_module=bool, find_program=find) == []
    assert looked_for == [asked]
    assert child_environment().get("CC", "").strip() == (cc or "").strip()
    assert ("CC" in child_environment()) == bool(cc and cc.strip())


@pytest.mark.parametrize("cc", ["no-such-compiler gcc", "'unclosed gcc"])
def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, cc: str) -> None:
    monkeypatch.setenv("CC", cc)
    [sentence] = machine.missing_tools("cuda", find_module=bool)
    assert "C compiler is missing" in sentence


@pytest.mark.parametrize(
    ("script", "present", "said"),
    [
        ("echo 'GPU 0: NVIDIA H200'", True, ""),
        ("echo 'No devices were found'", False, "No devices were found"),
        ("echo 'version mismatch' >&2; exit 18", False, "version mismatch"),
        (r"printf '\377'; exit 9", False, "\ufffd"),
    ],
)
def test_an_nvidia_smi_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys,
    script: str,
    present: bool,
    said: str,
) -> None:
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: [])
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.nvidia_gpu_present() == present
    printed = capsys.readouterr().out
    assert printed == "" if present else said in printed and "DEVICE=cuda" in printed
