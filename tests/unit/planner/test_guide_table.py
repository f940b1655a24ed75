"""The documents of a million tokens that docs/guide/million-tokens.md says fit are those of the planner."""

import re
from pathlib import Path

import pytest

from kimi_server.cli import main
from kimi_server.planner.checkpoints import KNOWN

PAGE = (Path(__file__).parents[3] / "docs/guide/million-tokens.md").read_text()
ROWS = re.findall(r"^\| (\d) x (\S+) \| (\d+) \| (\d*) ?\|$", PAGE, re.MULTILINE)
MODEL = next(iter(KNOWN))


@pytest.mark.parametrize(("count", "gpu", "documents", "shared"), ROWS)
def test_row(capsys: pytest.CaptureFixture[str], count: str, gpu: str, documents: str, shared: str) -> None:
    asked = ["plan", MODEL, "--gpus", f"{count}x{gpu}", "--tensor-parallel", count, "--context", "1M"]
    for expected, more in ((documents, []), (shared, ["--decode-context-parallel", count])):
        if expected:
            assert main([*asked, *more]) == 0
            assert capsys.readouterr().out.startswith(f"Yes: {expected} documents of 1M at once.")


def test_there_are_rows() -> None:
    assert len(ROWS) == 6
