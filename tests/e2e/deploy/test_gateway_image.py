"""deploy/Dockerfile.gateway is built and run without a daemon: it is small, has no torch, and serves as nobody's root.

Needs root, Debian's buildah and debootstrap, and 2 GB of disk.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.buildah import NEEDS_BUILDAH, Buildah, output, stop_all

IMAGE = "localhost/kimi-linear-gateway:test"
DOCKERFILE = "deploy/Dockerfile.gateway"
MOST_MB = 150  # of what is put upon the base
pytestmark = [pytest.mark.container, NEEDS_BUILDAH]


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is mounted at /weights, with a configuration of a replica that is not there."""
    folder = tmp_path_factory.mktemp("config")
    folder.chmod(0o755)
    (folder / "gateway.yaml").write_text("replicas: [{url: 'http://127.0.0.1:1'}]\n")
    return folder


def test_what_the_image_says_of_itself(buildah: Buildah) -> None:
    config = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    assert (config["User"], config["Entrypoint"]) == ("10001", ["kimi-linear", "gateway"])
    assert {"8080/tcp", "9464/tcp"} <= config["ExposedPorts"].keys()


def test_it_is_small_and_has_neither_torch_nor_a_compiler(buildah: Buildah, container: str) -> None:
    root = Path(buildah("mount", container))
    installed = {path.name for path in root.glob("opt/kimi-linear/lib/python3*/site-packages/*")}
    assert {"kimi_server", "fastapi", "opentelemetry"} <= installed
    assert not {"torch", "vllm", "transformers", "numpy", "pip"} & installed
    assert not list(root.glob("usr/bin/*gcc*")) and not (root / "src").exists()
    size = int(output("du", "-sm", root / "opt/kimi-linear").split()[0])
    print(f"{size} MB")
    assert size <= MOST_MB
    buildah("umount", container)


def test_it_runs_offline_and_is_unhealthy_without_a_replica(
    buildah: Buildah, container: str, config: Path, tmp_path: Path
) -> None:
    alive = ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
    healthy = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]["Healthcheck"]["Test"][1:]
    command = ["kimi-linear", "gateway", "--config", "/weights/gateway.yaml"]
    with (tmp_path / "log").open("wb") as log:
        whole = buildah.run(container, config, command, "ro")
        gateway = subprocess.Popen(whole, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(buildah.run(container, config, alive, "ro"), capture_output=True).returncode:
            assert gateway.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        assert subprocess.run(buildah.run(container, config, healthy, "ro"), capture_output=True).returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(gateway.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            gateway.wait(30)
        stop_all("10001")
