"""docs/conformance.md holds the cases of this suite, in its order, and each passed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def cases(path: Path) -> Iterator[tuple[str, str]]:
    """(feature, request) of every case in a test file, read from its marks."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in vars(module).items():
        for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
            if mark.name == "conformance":
                yield mark.args
            elif mark.name == "parametrize":
                yield from (m.args for p in mark.args[1] for m in p.marks if m.name == "conformance")


def test_table_names_the_cases(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-table", default=False):
        pytest.skip("this run is about to write the table")
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    expected = [case for file in files if file.name != Path(__file__).name for case in cases(file)]
    lines = (ROOT / "docs" / "conformance.md").read_text().splitlines()
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ", 2) for line in lines if line[:2] == "| "][2:]
    assert [(feature, request) for feature, request, _ in rows] == expected
    failed = [request for _, request, result in rows if not result.startswith("yes")]
    assert not failed
