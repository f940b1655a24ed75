"""The documents: links lead somewhere, commands and files exist, figures are those of the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import page
from kimi_server.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
TRACKED = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
]
# Where there is no git, as in an unpacked sdist, all that is no build output.
FILES = [path for path in TRACKED if path.is_file()] or [
    path
    for path in ROOT.rglob("*")
    if path.is_file() and not {".venv", ".git", "build"} & {*path.relative_to(ROOT).parts}
]
DOCUMENTS = sorted(path for path in FILES if path.suffix == ".md")
# Those that tell a reader what to type and where to look; results tell what was typed.
GUIDES = [path for path in DOCUMENTS if "benchmarks" not in path.parts and path.name != "CHANGELOG.md"]
OUR_MODULES = ("bench.", "benchmarks", "tests", "kimi", "vllm_kimi", "examples", "deploy")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its blocks of code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*\n", "", text, flags=re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[ ]", "-", re.sub(r"[^\w\- ]", "", heading.lower())) for heading in headings}


def commands(path: Path) -> list[str]:
    """Lines of code, and code within lines."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE) + re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_commands_exist(path: Path) -> None:
    for command in commands(path):
        if module := re.match(r"(?:\S+=\S+ )*python -m ([\w.]+)", command):
            assert not module[1].startswith(OUR_MODULES) or any(
                candidate.exists()
                for root in (ROOT, ROOT / "kernels", ROOT / "server", ROOT / "examples")
                for stem in [root / module[1].replace(".", "/")]
                for candidate in (stem.with_suffix(".py"), stem / "__main__.py")
            ), command
        if script := re.match(r"(?:\S+=\S+ )*python ([\w/]+\.py)", command):
            assert (ROOT / script[1]).is_file(), command
        if make := re.match(r"make ([a-z][a-z-]*)\b(?!:)", command):
            assert make[1] in TARGETS, command
        if ours := re.match(r"kimi-linear ([a-z]+)\b(?!:)", command):
            assert ours[1] in COMMANDS, command
        if re.match(r"(?:\S+=\S+ )*pytest ", command):
            for word in command.split():
                assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), command


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    """Whoever renames a file finds the documents that speak of it."""
    known = [name(found) for found in FILES]
    for code in re.findall(r"`([\w./-]+)`", prose(path)):
        if re.search(r"\w\.(py|c|h|sh)$", code) and not code.startswith("vllm/"):
            assert any(f"/{found}".endswith(f"/{code}") for found in known), code
        elif re.fullmatch(r"(vllm_kimi_linear|kernels|server|examples|benchmarks|deploy|tests)(/[\w-]+)*/", code):
            assert (ROOT / code).is_dir(), code


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_no_machine_of_ours_is_named(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(home|root|work|Users)/", path.read_text())


def test_rooms_of_the_packages_are_in_the_architecture() -> None:
    text = (ROOT / "docs/design/architecture.md").read_text()
    for package in ("vllm_kimi_linear", "server/kimi_server"):
        for room in sorted((ROOT / package).iterdir()):
            if room.is_dir() and any(room.glob("*.py")):
                assert f"{package}/{room.name}/" in text, room


def test_performance_is_what_the_command_makes() -> None:
    assert page.PAGE.read_text() == page.page(), "run `python -m benchmarks.page`"
    assert page.README.read_text() == page.readme(), "run `python -m benchmarks.page`"


def test_figures_of_a_row_are_of_one_run_and_the_ratio_says_who_is_faster() -> None:
    time, rate = page.Row("t", "a time"), page.Row("r", "a rate", "tokens/s")
    assert (page.faster(time, "2.0", "3.0"), page.faster(rate, "2.0", "3.0")) == ("1.50", "0.67")
    assert page.faster(time, "-", "3.0") == "-"
    server = page.Server({"t": (2, {"ours": "1500.00", "vLLM": "-"})}, [])
    assert server.row(page.Row("t", "a time", "s"), ("floor",)) == ["a time", "1.50 s", "-", "-", "-", "2"]


def test_tables_are_read_by_row_and_column() -> None:
    text = "# Title\n\n| row | ours |\n| --- | --- |\n| a | 1 |\n| b |  |\n\ntext\n\n| x |\n| --- |\n| y |\n"
    assert page.tables(text) == [{"a": {"row": "a", "ours": "1"}, "b": {"row": "b", "ours": ""}}, {"y": {"x": "y"}}]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: `make install` brings it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'class="mermaid"' in (tmp_path / "site/design/architecture.html").read_text()
