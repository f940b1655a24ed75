"""An image that is built once a file, which names it (IMAGE) and its recipe (DOCKERFILE)."""

import time
from collections.abc import Iterator

import pytest

from tests.support.buildah import ROOT, Buildah, building, offline


@pytest.fixture(scope="module")
def buildah(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """The image is built in its storage."""
    image, dockerfile = request.module.IMAGE, request.module.DOCKERFILE
    with building(tmp_path_factory.mktemp("buildah")) as builder:
        begun = time.monotonic()
        builder.build(image, ROOT / dockerfile)
        print(f"built in {time.monotonic() - begun:.0f} s: {builder('images', image)}")
        yield builder


@pytest.fixture(scope="module")
def container(request: pytest.FixtureRequest, buildah: Buildah) -> Iterator[str]:
    """A container of the image, for programs in a network namespace that has nothing but loopback."""
    with offline():
        name = buildah("from", "--pull-never", request.module.IMAGE)
        yield name
        buildah("rm", name)
