"""uv and pip themselves, on indexes made of a few empty wheels: where torch comes from, and which versions."""

import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy.install import packages
from deploy.install.packages import Tool, pip, uv
from deploy.install.pip_settings import uv_environment
from deploy.install.steps import Steps

TORCH = "torch==2.13.0+cpu"
NOTHING = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "UV_NO_CONFIG": "1", "UV_NO_CACHE": "1"}
BY_PIP = pytest.param("pip")
BY_UV = pytest.param("uv", marks=pytest.mark.skipif(not find_spec("uv"), reason="uv could not be had here"))


def add_wheel(index: Path, name: str, version: str, requires: str = "") -> None:
    """An empty wheel in a simple index of files."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


class Place:
    """An environment without any package, an index that is configured, and another for PyTorch's."""

    def __init__(self, folder: Path, name: str) -> None:
        self.index, self.pytorch, self.links = folder / "index", folder / "pytorch", folder / "links"
        self.links.mkdir()
        for version in ("1.0", "1.1", "1.2"):
            add_wheel(self.index, "dependency", version)
        add_wheel(self.index, "torch", "2.13.0", "dependency")
        add_wheel(self.pytorch, "torch", "2.13.0+cpu", "dependency")
        self.venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        # The tools of the tests' own environment, for the new one.
        python = str(self.venv / "bin/python")
        install = {
            "uv": [sys.executable, "-m", "uv", "pip", "install", "--python", python],
            "pip": [sys.executable, "-m", "pip", "--python", python, "install"],
        }[name]
        # An old pip does not know the options of a download, which change what is shown alone.
        self.tool: Tool = replace({"uv": uv, "pip": pip}[name](python), install=install, download=[])
        settings = {"index-url": self.index.as_uri(), "find-links": str(self.links)}
        of_pip = {"PIP_INDEX_URL": self.index.as_uri(), "PIP_FIND_LINKS": str(self.links)}
        self.steps = Steps(folder / "log", folder, uv_environment(settings, NOTHING | of_pip))
        (folder / packages.LOCKS).mkdir(parents=True)
        (folder / packages.NOT_ON_A_CPU).write_text("torchvision\n")
        self.lock = folder / packages.LOCKS / "cpu.txt"
        self.lock.write_text(f"{TORCH}\ndependency==1.1\n")

    def install(self) -> None:
        packages.install_torch_cpu(self.steps, self.tool, TORCH)
        packages.install_locked(self.steps, self.tool, "cpu", [TORCH, "dependency>=1"])

    def installed(self) -> set[str]:
        return {path.name.removesuffix(".dist-info") for path in self.venv.glob("lib/*/site-packages/*.dist-info")}


@pytest.fixture(params=[BY_UV, BY_PIP])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path, request.param)
    monkeypatch.setattr(packages, "PYTORCH_CPU_INDEX", made.pytorch.as_uri())
    return made


def test_torch_from_pytorchs_index_and_the_rest_as_locked(place: Place) -> None:
    place.install()
    assert place.installed() == {"torch-2.13.0+cpu", "dependency-1.1"}
    assert place.pytorch.as_uri() in place.steps.log.read_text()


def test_torch_from_the_links_that_pip_is_configured_with(place: Place) -> None:
    (place.pytorch / "torch/torch-2.13.0+cpu-py3-none-any.whl").rename(
        place.links / "torch-2.13.0+cpu-py3-none-any.whl"
    )
    place.install()
    assert place.installed() == {"torch-2.13.0+cpu", "dependency-1.1"}
    assert place.pytorch.as_uri() not in place.steps.log.read_text()


def test_a_locked_version_that_the_index_lacks(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.lock.write_text(f"{TORCH}\ndependency==1.1.5\n")
    place.install()
    assert place.installed() == {"torch-2.13.0+cpu", "dependency-1.2"}
    assert "one of these versions is not available" in capsys.readouterr().out
