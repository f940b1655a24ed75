"""deploy/install/locks: each version is pinned once, fits pyproject.toml, and no source is named."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.install import lock
from deploy.install.packages import LOCKS, requirements

ROOT = Path(__file__).resolve().parents[3]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def pins(device: str, python: str) -> dict[str, Version]:
    """Name -> version of a lock, for one Python on Linux."""
    on_linux = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: dict[str, Version] = {}
    for line in (ROOT / LOCKS / f"{device}.txt").read_text().splitlines():
        if line.strip().startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate(on_linux):
            continue
        [pin] = requirement.specifier
        assert pin.operator == "==" and not requirement.url, line
        assert requirement.name not in found, f"{requirement.name} is pinned twice for Python {python}"
        found[requirement.name] = Version(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lock_fits_what_is_required(device: str, python: str) -> None:
    locked = pins(device, python)
    for line in requirements(ROOT, device, lock.locked_extras(ROOT, device)):
        requirement = Requirement(line)
        version = locked.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{line} against {version}: run `make lock`"


def test_each_lock_has_the_torch_of_its_device() -> None:
    cpu, cuda = pins("cpu", "3.11"), pins("cuda", "3.11")
    assert (cpu["torch"].local, cuda["torch"].local) == ("cpu", None)
    assert "torchvision" not in cpu and not any(name.startswith("nvidia") for name in cpu)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_source_is_named(device: str) -> None:
    text = (ROOT / LOCKS / f"{device}.txt").read_text()
    assert not re.search(r"://|@|^\s*-", text, re.MULTILINE)


def test_every_extra_but_the_other_devices_is_locked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*lock.locked_extras(ROOT, "cpu"), "cpu", "cuda"} == set(extras)
