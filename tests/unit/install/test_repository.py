"""Workflows, hooks and the guide for contributors name commands that exist, and CI runs what everybody runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
GITHUB = ROOT / ".github"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# What a workflow may run beside make: a system package, and the draft of a release.
OTHERS = ("sudo apt-get update", "sudo apt-get install", "gh release create")


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


WORKFLOWS = {path.stem: load(path) for path in sorted((GITHUB / "workflows").glob("*.yml"))}


def runs(workflow: dict[Any, Any]) -> Iterator[str]:
    """Each command of a workflow's `run:`."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield from (command.strip() for command in line.split("&&"))


def targets(command: str) -> list[str]:
    """The targets of a command that begins with make."""
    return [word for word in shlex.split(command)[1:] if "=" not in word]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs_targets_of_make(name: str) -> None:
    commands = list(runs(WORKFLOWS[name]))
    by_make = [command for command in commands if command.startswith("make ")]
    assert by_make
    for command in by_make:
        assert targets(command) and set(targets(command)) <= TARGETS, command
    assert not [command for command in commands if command not in by_make and not command.startswith(OTHERS)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_is_bounded(name: str) -> None:
    """Whatever comes in with a pull request cannot write, and no job hangs for hours."""
    workflow = WORKFLOWS[name]
    events = workflow[True]  # YAML 1.1 reads `on` as a boolean
    assert "pull_request_target" not in events
    writes = "write" in workflow["permissions"].values()
    assert not (writes and "pull_request" in events)
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_what_ci_runs_is_what_a_contributor_runs() -> None:
    run = {target for command in runs(WORKFLOWS["test"]) if command.startswith("make ") for target in targets(command)}
    assert run >= {"lint", "test"}


def test_tested_pythons_are_supported_ones() -> None:
    pythons = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and pythons[0] == oldest[1] and all(isinstance(version, str) for version in pythons)


def test_hooks_are_the_commands_of_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    lint = {line.strip("\t @") for line in re.split(r"\n|&&", recipe[1].replace("$(BIN)", ".venv/bin")) if line.strip()}
    [repository] = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert {hook["entry"] for hook in repository["hooks"]} == {line.strip() for line in lint}


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_issue_form(path: Path) -> None:
    form = load(path)
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 0
    assert all(part["attributes"]["label"] for part in fields)
    assert all(part["type"] in ("textarea", "input", "dropdown") for part in fields)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_page_names_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
