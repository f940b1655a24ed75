"""deploy/install/stamp.py: what an environment depends on, and what is to be done with it."""

import shutil
from pathlib import Path

import pytest

from deploy.install import stamp

ROOT = Path(__file__).resolve().parents[3]
WANTED = {"root": "/tree", "device": "cpu", "extras": "server,test", "dependencies": "d", "project": "p"}


@pytest.mark.parametrize(
    ("found", "works", "todo"),
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
        (WANTED | {"extras": "server"}, True, "extras"),
        (WANTED | {"extras": ""}, True, "extras"),
        (WANTED | {"extras": "docs,server,test"}, True, "nothing"),
        (WANTED | {"extras": "server", "project": "old"}, True, "update"),
        (WANTED | {"extras": "docs,server,test", "project": "old"}, True, "project"),
    ],
)
def test_decision(found: dict | None, works: bool, todo: str) -> None:
    assert stamp.decide(found, WANTED, works) == todo


def test_extras_are_kept_beside_those_that_are_wanted() -> None:
    wanted = WANTED | {"extras": "server"}
    assert stamp.with_extras_of({"extras": "docs,server"}, wanted) == WANTED | {"extras": "docs,server"}
    assert stamp.with_extras_of({}, wanted) == wanted


@pytest.mark.parametrize("text", [None, "", '{"root": "/tr', "[]"])
def test_unreadable_stamp_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / stamp.NAME).write_text(text)
    assert stamp.read(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ("kernels/kda_kernels/cpu/new.c", {"project"}),
        ("setup.py", {"project"}),
        ("deploy/cpu-alias/pyproject.toml", {"dependencies"}),
        ("deploy/install/packages.py", {"dependencies"}),
        ("deploy/install/locks/cpu.txt", {"dependencies"}),
        ("vllm_kimi_linear/__init__.py", set()),
        ("vllm_kimi_linear/supported/install_check.py", set()),
    ],
)
def test_fingerprint_sees_what_an_install_depends_on(tmp_path: Path, changed: str, keys: set[str]) -> None:
    names = ["pyproject.toml", "setup.py", "deploy/install/packages.py", "deploy/cpu-alias/pyproject.toml"]
    for name in [*names, "vllm_kimi_linear/__init__.py", "vllm_kimi_linear/supported/install_check.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = stamp.fingerprint(tmp_path, "cpu", "server")
    assert before == stamp.fingerprint(tmp_path, "cpu", "server")
    (tmp_path / changed).parent.mkdir(parents=True, exist_ok=True)
    with open(tmp_path / changed, "a") as file:
        file.write("\n# changed\n")
    after = stamp.fingerprint(tmp_path, "cpu", "server")
    assert {key for key in before if before[key] != after[key]} == keys


def test_fingerprint_sees_dependencies_and_version(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "deploy", "vllm_kimi_linear/__init__.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    before = stamp.fingerprint(tree, "cpu", "server,test")
    fewer = stamp.fingerprint(tree, "cpu", "server")
    assert {key for key in before if before[key] != fewer[key]} == {"extras"}
    assert stamp.fingerprint(tree, "cpu", ",test,server,") == before
    (tree / "vllm_kimi_linear/__init__.py").write_text('__version__ = "99"\n')
    assert stamp.fingerprint(tree, "cpu", "server,test")["project"] != before["project"]
    text = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(text.replace('"fla-core==0.6.0"', '"fla-core==0.6.1"'))
    assert stamp.fingerprint(tree, "cpu", "server,test")["dependencies"] != before["dependencies"]
