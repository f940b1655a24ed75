"""`kimi-linear serve` where nothing is started; tests/e2e/planner starts servers by it."""

import re
from pathlib import Path

import pytest


def test_what_cannot_fit_starts_nothing(demo_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from kimi_server.cli import main

    assert main(["serve", str(demo_model), "--device", "cpu", "--memory", "256M", "--context", "1M"]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    [line] = error.splitlines()
    assert re.match(r"kimi-linear serve: 1 sequence of 1,048,576 tokens does not fit: .* choose --context \d+", line)
