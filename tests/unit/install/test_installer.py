"""deploy/install/__main__.py: an install that stops is never taken for a finished one."""

import re
import sys
from pathlib import Path

import pytest

from deploy.install import __main__ as installer
from deploy.install import stamp
from deploy.install.steps import Failed

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """main() on an environment in tmp_path, its real work replaced by what the test gives."""

    def run(work, venv: str | Path = tmp_path / "venv", asked: str = "") -> tuple[int, list[str]]:
        done: list[str] = []

        def fake_install(root: Path, venv: Path, device: str, todo: str, extras: str) -> None:
            done.append(f"{todo} {extras}" if asked else todo)
            venv.mkdir(exist_ok=True)
            assert not (venv / stamp.NAME).exists(), "a stamp stands while the environment is changed"
            work()

        monkeypatch.setattr(installer, "install", fake_install)
        monkeypatch.setattr(installer, "python_works", lambda python: True)
        monkeypatch.setattr(installer, "missing_tools", lambda device: [])
        extras = ["--extras", asked] if asked else []
        monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(venv), "--device", "cpu", *extras])
        return installer.main(), done

    return run


def test_finished_install_is_left_alone(run_main) -> None:
    assert run_main(lambda: None) == (0, ["anew"])
    assert run_main(lambda: None) == (0, [])


def test_extras_are_added_and_never_lost(run_main, tmp_path: Path) -> None:
    assert run_main(lambda: None, asked="server") == (0, ["anew server"])
    assert run_main(lambda: None, asked="server,test") == (0, ["extras server,test"])
    assert run_main(lambda: None, asked="server") == (0, [])
    stamp.write(tmp_path / "venv", (stamp.read(tmp_path / "venv") or {}) | {"project": "old"})
    assert run_main(lambda: None, asked="server") == (0, ["project server,test"])
    assert run_main(lambda: None, asked="test") == (0, [])


@pytest.mark.parametrize(("todo", "compiled"), [("extras", False), ("update", True)])
def test_extras_alone_do_not_build_the_project_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, todo: stamp.Todo, compiled: bool
) -> None:
    lines: list[str] = []

    def run(steps: installer.Steps, title: str, command: list[str], may_fail: bool = False) -> tuple[int, str]:
        lines.append(title)
        return 0, ""

    monkeypatch.setattr(installer.Steps, "run", run)
    monkeypatch.setattr(installer, "tools", lambda steps, python: [installer.pip(python)])
    monkeypatch.setattr(installer, "install_project", lambda *arguments: lines.append("this project"))
    installer.install(ROOT, tmp_path, "cuda", todo, "server,test")
    assert any(line.startswith("vLLM for CUDA and the rest") for line in lines)
    assert ("this project" in lines) is compiled


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
    run_main, tmp_path: Path, monkeypatch, capsys, kind: type[OSError]
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


def test_failed_install_is_not_taken_for_a_finished_one(run_main, capsys) -> None:
    def fails() -> None:
        raise Failed("no index answers")

    assert run_main(fails) == (1, ["anew"])
    assert capsys.readouterr().err == "make install: no index answers\n"
    assert run_main(lambda: None) == (0, ["anew"])


def test_interrupted_update_is_made_anew(run_main, tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    run_main(lambda: None)
    stamp.write(tmp_path / "venv", (stamp.read(tmp_path / "venv") or {}) | {"dependencies": "old"})
    assert run_main(interrupted) == (130, ["update"])
    assert run_main(lambda: None) == (0, ["anew"])


def test_missing_tool_stops_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(installer, "missing_tools", lambda device: ["A C compiler is missing."])
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv"), "--device", "cpu"])
    assert installer.main() == 1
    assert capsys.readouterr().err == "make install: A C compiler is missing.\n"
    assert not (tmp_path / "venv").exists()
