"""Images of ours, built and run without a daemon, on a base made by debootstrap.

Needs root, Debian's buildah and debootstrap, and disk. apt and pip use inside what they use outside.
"""

import ast
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("buildah", "debootstrap", "ip")
NAMESPACE = "kimi-offline"
BASE = "localhost/base"
NEEDS_BUILDAH = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason=f"needs root and {', '.join(TOOLS)}"
)


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
        return [
            "ip",
            "netns",
            "exec",
            NAMESPACE,
            *self.base,
            "run",
            "--isolation=chroot",
            mount,
            container,
            "--",
            *command,
        ]

    def build(self, tag: str, dockerfile: Path) -> None:
        """Build an image of ours on the base that debootstrap made."""
        options = ["--isolation=chroot", "--format=docker", f"--build-arg=BASE={BASE}", f"--tag={tag}"]
        self("bud", *options, *pip_settings(self.storage.parent), f"--file={dockerfile}", ROOT)

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


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Buildah]:
    """A buildah with the base image in a storage below `folder`, which is removed at the end."""
    builder = Buildah(folder / "storage")
    try:
        address, release = debian_mirror()
        include = "--include=ca-certificates,python3,python3-venv"
        output("debootstrap", "--variant=minbase", include, release, folder / "base", address)
        scratch = builder("from", "scratch")
        builder("copy", "--quiet", scratch, folder / "base", "/")
        builder("commit", "--quiet", "--rm", scratch, BASE)
        shutil.rmtree(folder / "base")
        yield builder
    finally:
        builder.clear()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The network namespace of containers that run: it has nothing but loopback."""
    subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True)
    output("ip", "netns", "add", NAMESPACE)
    output("ip", "-n", NAMESPACE, "link", "set", "lo", "up")
    yield
    output("ip", "netns", "delete", NAMESPACE)


def pids_of(uid: str) -> Iterator[Path]:
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if re.search(rf"^Uid:\s+{uid}\b", status.read_text(), re.MULTILINE):
                yield status.parent


def stop_all(uid: str) -> None:
    """End what a user's server left; nobody else has the image's user id."""
    for path in pids_of(uid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name), signal.SIGKILL)
