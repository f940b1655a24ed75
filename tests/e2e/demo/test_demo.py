"""`kimi-linear demo` where there is nothing but the package: a random checkpoint answers, and all is checked."""

from pathlib import Path

import pytest

from kimi_demo import demo
from kimi_server.cli import main


def test_the_demo_without_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--tokens=16"]) == 0
    shown = capsys.readouterr().out
    assert demo.PROMPT in shown and "16 of 16 tokens of the first answer agree" in shown
    assert {path.name for path in (tmp_path / ".demo").iterdir()} == {"model", "server.log"}
