"""deploy/Dockerfile.cpu is built and run without a daemon, on a base made by debootstrap, and serves offline.

Needs root, Debian's buildah and debootstrap, and 20 GB of disk. apt and pip use inside what they use outside.
"""

import ast
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("buildah", "debootstrap", "ip")
NAMESPACE = "kimi-offline"
IMAGE = "localhost/kimi-linear:cpu"
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
pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason=f"needs root and {', '.join(TOOLS)}"
    ),
]


def output(*command: str | Path, timeout: float = 3600) -> str:
    """What a command prints; fails with the end of both its streams."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


class Buildah:
    """buildah with a storage of its own and no daemon; processes of a container are isolated by chroot alone."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.base = ["buildah", "--root", str(storage / "root"), "--runroot", str(storage / "run")]
        self.base += ["--storage-driver", "vfs"]

    def __call__(self, *arguments: str | Path) -> str:
        return output(*self.base, *arguments)

    def run(self, container: str, weights: Path, command: Sequence[str], mode: str = "rw") -> list[str]:
        """The command line that runs `command` as the image's user, with no network but loopback."""
        mount = f"--volume={weights}:/weights:{mode}"
        offline = ["ip", "netns", "exec", NAMESPACE]
        return [*offline, *self.base, "run", "--isolation=chroot", mount, container, "--", *command]

    def clear(self) -> None:
        """Remove containers, images and storage; vfs leaves no mount behind."""
        with contextlib.suppress(AssertionError):
            self("rm", "--all")
        shutil.rmtree(self.storage, ignore_errors=True)


def debian_mirror() -> tuple[str, str]:
    """(address, release) of the Debian that apt uses here."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    targets = output("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(SITE)", "Identifier: Packages")
    sites = [line.split()[2] for line in targets.splitlines() if line.split()[:2] == [release, "main"]]
    if not sites:
        pytest.skip(f"apt knows no mirror of Debian's {release}")
    return sites[0], release


def pip_settings(folder: Path) -> list[str]:
    """buildah's options that give pip inside the settings, indexes and certificates that it has here."""
    settings: dict[str, str] = {}
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, value = line.split("=", 1)
        scope, key = name.rsplit(".", 1)
        if key not in settings or scope == ":env:":
            settings[key] = ast.literal_eval(value)
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    folder.chmod(0o755)
    words = " ".join(settings.values()).split()
    # An index in files keeps what it lists beside its folder `simple`.
    local = {word.removeprefix("file://").removesuffix("/simple") for word in words if re.match(r"(file://)?/", word)}
    return [f"--volume={config}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in sorted(local))]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """The image is built in its storage."""
    folder = tmp_path_factory.mktemp("buildah")
    builder = Buildah(folder / "storage")
    try:
        address, release = debian_mirror()
        include = "--include=ca-certificates,python3,python3-venv"
        output("debootstrap", "--variant=minbase", include, release, folder / "base", address)
        scratch = builder("from", "scratch")
        builder("copy", "--quiet", scratch, folder / "base", "/")
        builder("commit", "--quiet", "--rm", scratch, "localhost/base")
        shutil.rmtree(folder / "base")
        begun = time.monotonic()
        options = ["--isolation=chroot", "--format=docker", "--build-arg=BASE=localhost/base", f"--tag={IMAGE}"]
        builder("bud", *options, *pip_settings(folder), f"--file={ROOT / 'deploy/Dockerfile.cpu'}", ROOT)
        print(f"built in {time.monotonic() - begun:.0f} s: {builder('images', IMAGE)}")
        yield builder
    finally:
        builder.clear()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def container(buildah: Buildah) -> Iterator[str]:
    """A container of the image, for programs in a network namespace that has nothing but loopback."""
    subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True)
    output("ip", "netns", "add", NAMESPACE)
    output("ip", "-n", NAMESPACE, "link", "set", "lo", "up")
    name = buildah("from", "--pull-never", IMAGE)
    yield name
    buildah("rm", name)
    output("ip", "netns", "delete", NAMESPACE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that the image's user may write, above which no folder is closed to it."""
    folder = tmp_path_factory.mktemp("weights")
    os.chown(folder, 10001, 10001)
    folder.chmod(0o755)
    return folder


def test_what_the_image_says_of_itself(buildah: Buildah) -> None:
    config = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    assert config["User"] == "kimi"
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
    if not (ROOT / "server/kimi_server/cli.py").exists():
        pytest.skip("the tree has no gateway yet")
    assert "--config" in output(*buildah.run(container, weights, ["kimi-linear", "gateway", "--help"]))


def pids_of(uid: str) -> Iterator[Path]:
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if re.search(rf"^Uid:\s+{uid}\b", status.read_text(), re.MULTILINE):
                yield status.parent


def process_of(uid: str) -> bytes:
    """The command lines of a user's processes."""
    return b"\n".join((path / "cmdline").read_bytes() for path in pids_of(uid))


def stop_all(uid: str) -> None:
    """End what a user's server left; nobody else has the image's user id."""
    for path in pids_of(uid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name), signal.SIGKILL)
