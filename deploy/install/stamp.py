"""The stamp in an environment: what was installed, and so what is left to do.

It is written when everything is done and taken away before anything is changed. An environment without one is
half-finished and is made anew; one whose stamp matches the tree is left as it is, without asking any index.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

NAME = "kimi-linear.json"
Todo = Literal["nothing", "extras", "project", "update", "anew"]


def fingerprint(root: Path, device: str, extras: str) -> dict[str, str]:
    """What an installed environment depends on, as the stamp records it."""

    def digest(*parts: str | bytes) -> str:
        joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
        return hashlib.sha256(joined).hexdigest()

    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    project = pyproject["project"]
    dependencies = {key: project.get(key) for key in ("dependencies", "optional-dependencies")}
    version = re.search(r"^__version__.*$", (root / "vllm_kimi_linear/__init__.py").read_text(), re.MULTILINE)
    installer = [*root.glob("deploy/install/*.py"), *root.glob("deploy/install/locks/*.txt")]
    sources = root.glob("kernels/kda_kernels/cpu/*.[ch]")
    return {
        "root": str(root),
        "device": device,
        "extras": ",".join(sorted(_names(extras))),
        "dependencies": digest(
            json.dumps([dependencies, pyproject["build-system"]], sort_keys=True),
            (root / "deploy/cpu-alias/pyproject.toml").read_bytes(),
            *(part for path in sorted(installer) for part in (path.name, path.read_bytes())),
        ),
        "project": digest(
            (root / "pyproject.toml").read_bytes(),
            (root / "setup.py").read_bytes(),
            version.group() if version else "",
            *(part for path in sorted(sources) for part in (path.name, path.read_bytes())),
        ),
    }


def decide(stamp: Mapping[str, str] | None, wanted: Mapping[str, str], works: bool) -> Todo:
    """What to do: `nothing`, `extras` (add those that lack), `project` (build ours again), `update` (both) or `anew`.

    An environment with more extras than are wanted serves.

    Args:
        stamp: what the environment's stamp says; None where there is none.
        wanted: the fingerprint of the tree.
        works: whether the environment's Python and pip run.
    """
    if not works or stamp is None or any(stamp.get(key) != wanted[key] for key in ("root", "device")):
        return "anew"
    if stamp.get("dependencies") != wanted["dependencies"]:
        return "update"
    lacks_extras = not _names(wanted["extras"]) <= _names(stamp.get("extras", ""))
    if stamp.get("project") != wanted["project"]:
        return "update" if lacks_extras else "project"
    return "extras" if lacks_extras else "nothing"


def with_extras_of(stamp: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint `wanted`, with the extras that the environment has beside: they are kept, and kept fitting."""
    return {**wanted, "extras": ",".join(sorted(_names(wanted["extras"]) | _names(stamp.get("extras", ""))))}


def _names(extras: str) -> set[str]:
    return {name for name in extras.split(",") if name}


def read(venv: Path) -> dict[str, str] | None:
    """The environment's stamp, or None where there is none that can be read."""
    try:
        stamp = json.loads((venv / NAME).read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def write(venv: Path, fingerprint: Mapping[str, str]) -> None:
    """State that the environment is what this fingerprint says."""
    (venv / NAME).write_text(json.dumps(fingerprint))


def remove(venv: Path) -> None:
    """State that the environment is being changed."""
    (venv / NAME).unlink(missing_ok=True)
