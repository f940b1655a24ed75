"""deploy/Dockerfile.cpu is built and run without a daemon, on a base made by debootstrap, and serves offline.

Needs root, Debian's buildah and debootstrap, and 20 GB of disk. apt and pip use inside what they use outside.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.buildah import NEEDS_BUILDAH, Buildah, output, pids_of, stop_all

IMAGE = "localhost/kimi-linear:cpu"
DOCKERFILE = "deploy/Dockerfile.cpu"
SERVE = (
    "vllm serve /weights/demo --host 127.0.0.1 --served-model-name demo --dtype float32 --max-model-len 8192"
    " --kv-cache-memory-bytes 64M"
)
CHAT = """
import json, urllib.request
body = {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "What is a delta rule?"}]}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
pytestmark = [pytest.mark.container, NEEDS_BUILDAH]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that the image's user may write, above which no folder is closed to it."""
    folder = tmp_path_factory.mktemp("weights")
    os.chown(folder, 10001, 10001)
    folder.chmod(0o755)
    return folder


def test_what_the_image_says_of_itself(buildah: Buildah) -> None:
    config = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    assert config["User"] == "10001"
    assert config["Entrypoint"] == ["vllm", "serve"]
    assert "/weights" in config["Volumes"]
    assert "8000/tcp" in config["ExposedPorts"]
    assert "HEALTH_URL" in " ".join(config["Healthcheck"]["Test"])
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"} <= set(config["Env"])


def test_nothing_of_this_machine_is_in_the_image(buildah: Buildah, container: str) -> None:
    root = Path(buildah("mount", container))
    assert (root / "opt/kimi-linear/.venv").is_dir()
    for path in ("etc/pip.conf", "home/kimi/.config/pip/pip.conf"):
        assert not (root / path).exists() or (root / path).read_text() == ""
    assert not (root / "opt/kimi-linear/tests").exists()
    copied = {path.name for path in (root / "opt/kimi-linear/deploy").iterdir()} - {"__pycache__"}
    assert copied == {"install", "cpu-alias"}
    buildah("umount", container)


def test_serves_offline_as_an_ordinary_user(buildah: Buildah, container: str, weights: Path, tmp_path: Path) -> None:
    """The demo checkpoint is written by the image itself, then served from a volume that is read-only."""
    write = ["python3", "-m", "kimi_demo.checkpoint", "--out", "/weights/demo"]
    output(*buildah.run(container, weights, write))
    config = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    check_health = buildah.run(container, weights, config["Healthcheck"]["Test"][1:], "ro")
    env = ["env", "OMP_NUM_THREADS=1", "VLLM_CPU_OMP_THREADS_BIND=nobind"]
    with (tmp_path / "server.log").open("wb") as log:
        command = buildah.run(container, weights, [*env, *SERVE.split()], "ro")
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        assert subprocess.run(check_health, capture_output=True).returncode != 0, "healthy before it serves"
        deadline = time.monotonic() + 300
        while subprocess.run(check_health, capture_output=True).returncode:
            said = (tmp_path / "server.log").read_text(errors="replace")[-4000:]
            assert server.poll() is None and time.monotonic() < deadline, said
            time.sleep(1)
        assert b"\0serve\0/weights/demo" in process_of("10001")
        answer = json.loads(output(*buildah.run(container, weights, ["python3", "-c", CHAT], "ro")))
        assert answer["usage"]["completion_tokens"] == 8
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        stop_all("10001")


def test_the_gateway_is_in_the_image(buildah: Buildah, container: str, weights: Path) -> None:
    assert "--config" in output(*buildah.run(container, weights, ["kimi-linear", "gateway", "--help"]))


def process_of(uid: str) -> bytes:
    """The command lines of a user's processes."""
    return b"\n".join((path / "cmdline").read_bytes() for path in pids_of(uid))
