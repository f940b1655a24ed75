"""The Dockerfiles against hadolint, and against what no linter knows: who runs, what is fetched and from where."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dockerfiles import DOCKERFILES, ROOT, instructions

HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed: `make install` brings it")
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([str(HADOLINT), "--no-color", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed: `make install` brings it")
def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text((ROOT / "Dockerfile").read_text().replace("USER 10001", "USER kimi"))
    command = [str(HADOLINT), "--config", str(ROOT / ".hadolint.yaml"), str(bad)]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode


@pytest.mark.parametrize("name", DOCKERFILES)
def test_rules_of_our_own(name: str) -> None:
    steps = instructions(name)
    names = [step for step, _ in steps]
    base = dict(steps)["ARG"].removeprefix("BASE=")
    assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", base), "a base without a version is another one tomorrow"
    assert all(argument.startswith("${BASE}") for step, argument in steps if step == "FROM")
    assert "ADD" not in names and "SHELL" not in names
    assert [argument for step, argument in steps if step == "USER"] == ["10001"]
    assert "HEALTHCHECK" in names and names[-1] == "ENTRYPOINT"
    last = len(names) - names[::-1].index("USER")
    assert "ENTRYPOINT" in names[last:]
    for step, argument in steps:
        assert "latest" not in argument and not re.search(r"\b(curl|wget|sudo|chmod 777)\b", argument)
        if "pip install" in argument:
            assert "--no-cache-dir" in argument
        if "apt-get install" in argument:
            assert "--no-install-recommends" in argument and "rm -rf /var/lib/apt/lists/*" in argument
        assert not (step in ("ENV", "ARG") and re.search(r"(?i)(secret|password|token|api_key)=", argument))
