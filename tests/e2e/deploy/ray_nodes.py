"""Two Ray nodes on this machine, each in a network namespace of its own, with a cable between them and no way out.

vLLM's CPU platform names no Ray resource, so it refuses Ray. It is lent the resource "GPU", of which each node declares
one: all else is what a cluster with GPUs runs.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kimi_demo.server import DEFAULT_ENV

NODES = {"kimi-ray-a": "10.77.0.1", "kimi-ray-b": "10.77.0.2"}
HEAD, WORKER = NODES
ADDRESS = f"{NODES[HEAD]}:6379"
LINK = "eth0"  # of both nodes: gloo is told its name once, for all
SESSIONS = Path("/tmp/kimi-ray")  # short: Ray's sockets lie in it, and their names may have 107 bytes
LEND = '''
import importlib.util, sys

class Lender:
    """Sets the one attribute once vLLM's CPU platform is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(Lender)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Lender)
'''


def environment(folder: Path) -> dict[str, str]:
    """Of all nodes: one thread a process, a token that they share, and the resource lent; `folder` keeps its files."""
    (folder / "sitecustomize.py").write_text(LEND)
    (folder / "token").write_text(secrets.token_hex(32))
    path = os.pathsep.join([str(folder), *(os.path.abspath(place) for place in sys.path if place)])
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    more |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK, "RAY_ADDRESS": ADDRESS, "VLLM_HOST_IP": NODES[HEAD]}
    return {**DEFAULT_ENV, **os.environ, **more, "PYTHONPATH": path}


def inside(node: str, *command: str) -> list[str]:
    """The command line that runs `command` on a node."""
    return ["ip", "netns", "exec", node, *command]


@contextlib.contextmanager
def network() -> Iterator[None]:
    """The two namespaces; every process in them ends with it."""
    _remove_network()
    for node in NODES:
        subprocess.run(["ip", "netns", "add", node], check=True)
    cable = ["ip", "link", "add", LINK, "netns", HEAD, "type", "veth", "peer", "name", LINK, "netns", WORKER]
    subprocess.run(cable, check=True)
    for node, address in NODES.items():
        for change in (["addr", "add", f"{address}/24", "dev", LINK], ["link", "set", LINK, "up"]):
            subprocess.run(["ip", "-n", node, *change], check=True)
        subprocess.run(["ip", "-n", node, "link", "set", "lo", "up"], check=True)
    try:
        yield
    finally:
        _remove_network()


@contextlib.contextmanager
def cluster(env: dict[str, str]) -> Iterator[None]:
    """A Ray head and a Ray node that joined it, one accelerator each."""
    has = ["--num-gpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={SESSIONS}"]
    try:
        _ray(HEAD, env, "start", *head, f"--node-ip-address={NODES[HEAD]}", "--num-cpus=4", *has)
        _ray(WORKER, env, "start", f"--address={ADDRESS}", f"--node-ip-address={NODES[WORKER]}", "--num-cpus=0", *has)
        yield
    finally:
        for node in NODES:
            _stop(node)
        shutil.rmtree(SESSIONS, ignore_errors=True)


def _ray(node: str, env: dict[str, str], *arguments: str) -> None:
    """Run Ray's command line on a node, again where it fails: Ray gives a raylet 30 s, few on a busy machine."""
    main = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
    command = inside(node, sys.executable, "-c", main, *arguments)
    tries = 3
    for _ in range(tries):
        done = subprocess.run(command, env={**env, "VLLM_HOST_IP": NODES[node]}, capture_output=True, text=True)
        if done.returncode == 0:
            return
        _stop(node)
    raise AssertionError(f"ray {arguments} failed {tries} times: {done.stdout}{done.stderr}")


def _stop(node: str) -> None:
    """End every process of a namespace."""
    for _ in range(2):  # again for those that were being born
        for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.5)


def _remove_network() -> None:
    for node in NODES:
        _stop(node)
        subprocess.run(["ip", "netns", "delete", node], capture_output=True)
