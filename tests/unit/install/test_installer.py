"""The decisions of deploy/install.py, and that an install which stops is never taken for a finished one."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
NOT_FOUND = """
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: 2.13.0)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
WANTED = {"root": "/tree", "device": "cpu", "dependencies": "d", "project": "p"}


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """deploy/install.py as a module; what it imports from its own folder too."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    spec = importlib.util.spec_from_file_location("kimi_linear_installer", ROOT / "deploy/install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeSteps:
    """Records commands; those that contain a key of `results` end as it says."""

    def __init__(self, failed: type[Exception], results: dict[str, tuple[int, str]]) -> None:
        self.failed = failed
        self.results = results
        self.commands: list[list[str]] = []

    def run(self, title: str, command: list[str], may_fail: bool = False) -> tuple[int, str]:
        self.commands.append(command)
        code, output = next((end for key, end in self.results.items() if key in " ".join(command)), (0, ""))
        if code and not may_fail:
            self.fail(title)
        return code, output

    def fail(self, sentence: str, output: str = "") -> None:
        raise self.failed(sentence)


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
def test_device(installer: ModuleType, asked: str, installed: str, gpu: bool, device: str) -> None:
    assert installer.choose_device(asked, installed, lambda: gpu) == device


def test_unknown_device_is_refused(installer: ModuleType) -> None:
    with pytest.raises(installer.Failed, match=r"^DEVICE=tpu is not a device: use DEVICE=cpu or DEVICE=cuda"):
        installer.choose_device("tpu", "", lambda: False)


def test_missing_tools_are_named(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)

    def no_library(name: str) -> None:
        raise OSError(name)

    def missing(device: str, **lacking) -> list[str]:
        present = {"find_module": bool, "find_program": bool, "load_library": bool}
        return installer.missing_tools(device, **(present | lacking))

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
def test_the_compiler_is_the_first_word_of_cc(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, cc: str | None, asked: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    looked_for: list[str] = []

    def find(name: str) -> bool:
        looked_for.append(name)
        return True

    assert installer.missing_tools("cuda", find_module=bool, find_program=find) == []
    assert looked_for == [asked]
    assert installer.child_environment().get("CC", "").strip() == (cc or "").strip()
    assert ("CC" in installer.child_environment()) == bool(cc and cc.strip())


@pytest.mark.parametrize("cc", ["no-such-compiler gcc", "'unclosed gcc"])
def test_a_compiler_that_is_not_there(installer: ModuleType, monkeypatch: pytest.MonkeyPatch, cc: str) -> None:
    monkeypatch.setenv("CC", cc)
    [sentence] = installer.missing_tools("cuda", find_module=bool)
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
    installer: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys,
    script: str,
    present: bool,
    said: str,
) -> None:
    monkeypatch.setattr(installer.glob, "glob", lambda pattern: [])
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert installer.nvidia_gpu_present() == present
    printed = capsys.readouterr().out
    assert printed == "" if present else said in printed and "DEVICE=cuda" in printed


def test_torch_from_the_configured_index(installer: ModuleType) -> None:
    steps = FakeSteps(installer.Failed, {})
    installer.install_torch_cpu(steps, ["pip", "install"], "torch==2.13.0")
    assert steps.commands == [["pip", "install", "torch==2.13.0+cpu"]]


def test_torch_from_pytorch_only_where_the_index_has_none(installer: ModuleType) -> None:
    steps = FakeSteps(installer.Failed, {"install torch==2.13.0+cpu": (1, NOT_FOUND)})
    installer.install_torch_cpu(steps, ["pip", "install"], "torch==2.13.0")
    _, fallback = steps.commands
    index = ["--index-url", "https://download.pytorch.org/whl/cpu"]
    assert fallback == ["pip", "install", "--no-deps", *index, "torch==2.13.0+cpu"]


def test_torch_that_fails_otherwise_stops_the_install(installer: ModuleType) -> None:
    steps = FakeSteps(installer.Failed, {"torch": (1, "ERROR: [Errno 28] No space left on device")})
    with pytest.raises(installer.Failed, match="could not be installed"):
        installer.install_torch_cpu(steps, ["pip", "install"], "torch==2.13.0")
    assert len(steps.commands) == 1


def test_only_companions_that_do_not_load_are_removed(installer: ModuleType) -> None:
    steps = FakeSteps(installer.Failed, {"__import__('torchvision')": (1, "RuntimeError")})
    installer.remove_broken_companions(steps, "python")
    assert steps.commands[-1] == ["python", "-m", "pip", "uninstall", "--yes", "torchvision"]
    steps = FakeSteps(installer.Failed, {})
    installer.remove_broken_companions(steps, "python")
    assert not any("uninstall" in command for command in steps.commands)


@pytest.mark.parametrize(
    ("stamp", "works", "todo"),
    [
        (WANTED, True, "nothing"),
        (WANTED, False, "anew"),
        (None, True, "anew"),
        (None, False, "anew"),
        ({}, True, "anew"),
        (WANTED | {"root": "/moved"}, True, "anew"),
        (WANTED | {"device": "cuda"}, True, "anew"),
        (WANTED | {"dependencies": "old"}, True, "update"),
        (WANTED | {"dependencies": "old", "project": "old"}, True, "update"),
        (WANTED | {"project": "old"}, True, "project"),
    ],
)
def test_decision(installer: ModuleType, stamp: dict | None, works: bool, todo: str) -> None:
    assert installer.decide(stamp, WANTED, works) == todo


@pytest.mark.parametrize("text", [None, "", '{"root": "/tr', "[]"])
def test_unreadable_stamp_is_none(installer: ModuleType, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / installer.STAMP).write_text(text)
    assert installer.read_stamp(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ("kernels/kda_kernels/cpu/new.c", {"project"}),
        ("setup.py", {"project"}),
        ("deploy/cpu-alias/pyproject.toml", {"dependencies"}),
        ("vllm_kimi_linear/__init__.py", set()),
        ("vllm_kimi_linear/supported/install_check.py", set()),
    ],
)
def test_fingerprint_sees_what_an_install_depends_on(
    installer: ModuleType, tmp_path: Path, changed: str, keys: set[str]
) -> None:
    names = ["pyproject.toml", "setup.py", "deploy/install.py", "deploy/cpu-alias/pyproject.toml"]
    for name in [*names, "vllm_kimi_linear/__init__.py", "vllm_kimi_linear/supported/install_check.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = installer.fingerprint(tmp_path, "cpu")
    assert before == installer.fingerprint(tmp_path, "cpu")
    (tmp_path / changed).parent.mkdir(parents=True, exist_ok=True)
    with open(tmp_path / changed, "a") as file:
        file.write("\n# changed\n")
    after = installer.fingerprint(tmp_path, "cpu")
    assert {key for key in before if before[key] != after[key]} == keys


def test_fingerprint_sees_dependencies_and_version(installer: ModuleType, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "deploy", "vllm_kimi_linear/__init__.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    before = installer.fingerprint(tree, "cpu")
    assert installer.fingerprint(tree, "cpu", "server")["dependencies"] != before["dependencies"]
    (tree / "vllm_kimi_linear/__init__.py").write_text('__version__ = "99"\n')
    assert installer.fingerprint(tree, "cpu")["project"] != before["project"]
    text = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(text.replace('"fla-core==0.6.0"', '"fla-core==0.6.1"'))
    assert installer.fingerprint(tree, "cpu")["dependencies"] != before["dependencies"]


@pytest.fixture
def run_main(installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """main() on an environment in tmp_path, its real work replaced by what the test gives."""

    def run(work, venv: str | Path = tmp_path / "venv") -> tuple[int, list[str]]:
        done: list[str] = []

        def fake_install(root: Path, venv: Path, device: str, todo: str, extras: str) -> None:
            done.append(todo)
            venv.mkdir(exist_ok=True)
            assert not (venv / installer.STAMP).exists(), "a stamp stands while the environment is changed"
            work()

        monkeypatch.setattr(installer, "install", fake_install)
        monkeypatch.setattr(installer, "python_works", lambda python: True)
        monkeypatch.setattr(installer, "missing_tools", lambda device: [])
        monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(venv), "--device", "cpu"])
        return installer.main(), done

    return run


def test_finished_install_is_left_alone(run_main) -> None:
    assert run_main(lambda: None) == (0, ["anew"])
    assert run_main(lambda: None) == (0, [])


def test_the_environment_may_be_anywhere(run_main, tmp_path: Path) -> None:
    for venv in (tmp_path / "no" / "such" / "folder", tmp_path / "with a space" / "my venv"):
        assert run_main(lambda: None, venv) == (0, ["anew"])
        assert run_main(lambda: None, venv) == (0, [])
    (tmp_path / "empty").mkdir()
    assert run_main(lambda: None, tmp_path / "empty") == (0, ["anew"])


def test_what_is_no_environment_is_not_replaced(run_main, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    monkeypatch.chdir(tmp_path / "home")
    for venv in (tmp_path / "file", tmp_path / "home", ""):
        assert run_main(lambda: pytest.fail("ran"), venv) == (1, [])
        [sentence] = capsys.readouterr().err.splitlines()
        assert sentence.startswith("make install: --venv is ") and sentence.endswith("name another folder.")
    assert (tmp_path / "file").read_text() == (tmp_path / "home" / "letter").read_text() == "mine"


@pytest.mark.parametrize("kind", [PermissionError, OSError])
def test_a_place_that_cannot_be_written_gets_one_sentence(
    installer: ModuleType, run_main, tmp_path: Path, monkeypatch, capsys, kind: type[OSError]
) -> None:
    (tmp_path / "file").write_text("")
    venv = tmp_path / "file" / "venv"
    if kind is PermissionError:  # whoever runs the tests may write everywhere
        venv = tmp_path / "venv"

        def refuse(*arguments: object, **more: object) -> None:
            raise PermissionError(13, "Permission denied", str(tmp_path))

        monkeypatch.setattr(installer.Path, "mkdir", refuse)
    assert run_main(lambda: None, venv) == (1, [])
    [sentence] = capsys.readouterr().err.splitlines()
    assert re.search(r" (Permission denied|Not a directory|File exists): '/.*'; --venv names another", sentence)


def test_failed_install_is_not_taken_for_a_finished_one(installer: ModuleType, run_main, capsys) -> None:
    def fails() -> None:
        raise installer.Failed("no index answers")

    assert run_main(fails) == (1, ["anew"])
    assert capsys.readouterr().err == "make install: no index answers\n"
    assert run_main(lambda: None) == (0, ["anew"])


def test_interrupted_update_is_made_anew(installer: ModuleType, run_main, tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    run_main(lambda: None)
    stamp = tmp_path / "venv" / installer.STAMP
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"dependencies": "old"}))
    assert run_main(interrupted) == (130, ["update"])
    assert run_main(lambda: None) == (0, ["anew"])


def test_missing_tool_stops_before_anything_is_made(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(installer, "missing_tools", lambda device: ["A C compiler is missing."])
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv"), "--device", "cpu"])
    assert installer.main() == 1
    assert capsys.readouterr().err == "make install: A C compiler is missing.\n"
    assert not (tmp_path / "venv").exists()


def test_step_that_fails_says_what_was_printed_last(installer: ModuleType, tmp_path: Path) -> None:
    steps = installer.Steps(tmp_path / "log", tmp_path, {})
    with pytest.raises(installer.Failed, match=r"trying: failed\.\n  the reason\n"):
        steps.run("trying", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "the reason\n[exit 3]" in (tmp_path / "log").read_text()


def test_step_shows_that_it_lives(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    steps = installer.Steps(tmp_path / "log", tmp_path, {})
    steps.pause = 0.05
    show, shown_once = steps._show, tmp_path / "shown"

    def seen(title: str, state: str, last: bool = False) -> None:
        show(title, state, last)
        if "Collecting torch" in state:
            shown_once.touch()

    monkeypatch.setattr(steps, "_show", seen)
    script = (
        "import pathlib, time; print('Collecting torch', flush=True)\n"
        f"while not pathlib.Path({str(shown_once)!r}).exists(): time.sleep(0.01)\n"
        "print('end')"
    )
    assert steps.run("working", [sys.executable, "-c", script]) == (0, "Collecting torch\nend\n")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "[1] working: ..."
    assert any("Collecting torch" in line for line in shown[1:-1])
    assert shown[-1].startswith("[1] working: done")


def test_download_is_shown_as_a_share(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from steps import activity  # the installer's folder is on the path while its fixture lives

    downloading = ["Downloading torch.whl\n", "Progress 10 of 40\n", "Progress 20 of 40\n"]
    assert activity(downloading) == "Downloading torch.whl 50%"
    assert activity(["Progress 40 of 40\n", "Installing\n"]) == "Installing"
    assert activity([]) == ""
