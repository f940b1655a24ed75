"""deploy/install/steps.py: what is shown of a command, and kept of it."""

import sys
from pathlib import Path

import pytest

from deploy.install.steps import Failed, Steps, activity


def test_step_that_fails_says_what_was_printed_last(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "log", tmp_path, {})
    with pytest.raises(Failed, match=r"trying: failed\.\n  the reason\n"):
        steps.run("trying", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "the reason\n[exit 3]" in (tmp_path / "log").read_text()


def test_step_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    steps = Steps(tmp_path / "log", tmp_path, {})
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


def test_download_is_shown_as_a_share() -> None:
    downloading = ["Downloading torch.whl\n", "Progress 10 of 40\n", "Progress 20 of 40\n"]
    assert activity(downloading) == "Downloading torch.whl 50%"
    assert activity(["Progress 40 of 40\n", "Installing\n"]) == "Installing"
    assert activity([]) == ""
    assert activity(["DEBUG gcc -O3\n"]) == "gcc -O3"
