"""deploy/release.py: a tag is built only if version and changelog agree with it."""

import sys
from pathlib import Path

import pytest

from deploy import release

CHANGELOG = """# Changelog

## 1.2.0 (unreleased)

- Next.

## 1.1.0 (2026-11-30)

- First line.
- Second line.

## 1.0.0 (2026-10-01)
"""


def test_notes_are_the_entry_alone() -> None:
    assert release.notes(CHANGELOG, "1.1.0") == "- First line.\n- Second line.\n"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("1.2.0", "`## 1.2.0 (unreleased)`: give it the date"),
        ("1.0.0", "says nothing below `## 1.0.0 (2026-10-01)`"),
        ("1.3.0", "has no `## 1.3.0 (date)`"),
        ("1.1", "`## 1.1.0 (2026-11-30)`: give it"),
    ],
)
def test_an_entry_that_is_not_ready(version: str, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        release.notes(CHANGELOG, version)
    assert says in str(raised.value)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A tree of version 1.1.0; the commands that would build it."""
    (tmp_path / "vllm_kimi_linear").mkdir()
    (tmp_path / "vllm_kimi_linear/__init__.py").write_text('"""Plugin."""\n\n__version__ = "1.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str]) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release.subprocess, "run", run)
    return commands


@pytest.mark.parametrize("tag", ["", "v1.1.0"])
def test_a_build(built: list[list[str]], tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["release", "--tag", tag])
    assert release.main() == 0
    [command] = built
    assert command[-3:] == ["--out-dir", str(tmp_path / "dist"), str(tmp_path)]
    assert (tmp_path / "dist/notes.md").exists() == bool(tag)


@pytest.mark.parametrize("tag", ["v1.2.0", "1.1.0"])
def test_a_tag_that_is_not_the_version(
    built: list[list[str]], tag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["release", "--tag", tag])
    assert release.main() == 1
    assert not built
    assert capsys.readouterr().err == f"make dist: TAG={tag} is not the version, which is 1.1.0: use TAG=v1.1.0.\n"


def test_the_tree_has_a_version() -> None:
    import vllm_kimi_linear

    assert release.version_of(release.ROOT) == vllm_kimi_linear.__version__
