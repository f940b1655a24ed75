"""One server over two Ray nodes, each in a network namespace of its own: the same tokens as alone.

vLLM's CPU platform names no Ray resource, so it refuses Ray. The test shows that, then lends it the resource "GPU",
of which each Ray node declares one: all else is what a cluster with GPUs runs. Needs root, `ip` and Ray.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.conftest import FLAGS
from vllm_kimi_linear.launch import DEFAULT_ENV

NODES = {"kimi-ray-a": "10.77.0.1", "kimi-ray-b": "10.77.0.2"}
HEAD, WORKER = NODES
ADDRESS = f"{NODES[HEAD]}:6379"
LINK = "eth0"  # of both nodes: gloo is told its name once, for all
PROMPTS = [[5 + 7 * i % 500 for i in range(length)] for length in (1, 5, 130, 1500)]
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
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not importlib.util.find_spec("ray"),
        reason="needs root, ip and the extra `ray`",
    ),
]


def inside(node: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", node, *command]


def ray(node: str, env: dict[str, str], *arguments: str) -> None:
    """Run Ray's command line on a node; fails with what it printed."""
    main = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
    command = inside(node, sys.executable, "-c", main, *arguments)
    done = subprocess.run(command, env={**env, "VLLM_HOST_IP": NODES[node]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def stop(node: str) -> None:
    """End every process of a namespace."""
    for _ in range(2):
        for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.5)


def remove_network() -> None:
    for node in NODES:
        stop(node)
        subprocess.run(["ip", "netns", "delete", node], capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Two namespaces with a cable between them and no way out."""
    remove_network()
    for node in NODES:
        subprocess.run(["ip", "netns", "add", node], check=True)
    cable = ["ip", "link", "add", LINK, "netns", HEAD, "type", "veth", "peer", "name", LINK, "netns", WORKER]
    subprocess.run(cable, check=True)
    for node, address in NODES.items():
        for change in (["addr", "add", f"{address}/24", "dev", LINK], ["link", "set", LINK, "up"]):
            subprocess.run(["ip", "-n", node, *change], check=True)
        subprocess.run(["ip", "-n", node, "link", "set", "lo", "up"], check=True)
    yield
    remove_network()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the nodes and the servers: one thread a process, and the resource lent to the CPU platform."""
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(LEND)
    path = os.pathsep.join(filter(None, [str(hook), *map(os.path.abspath, sys.path[1:])]))
    more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK, "RAY_ADDRESS": ADDRESS, "VLLM_HOST_IP": NODES[HEAD]}
    return {**DEFAULT_ENV, **os.environ, "RAY_USAGE_STATS_ENABLED": "0", **more, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def cluster(network: None, environment: dict[str, str]) -> Iterator[None]:
    """A Ray head and a Ray node that joined it, one accelerator each."""
    folder = Path("/tmp/kimi-ray")  # short: Ray's sockets lie in it, and their names may have 107 bytes
    has = ["--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
    try:
        ray(HEAD, environment, "start", *head, f"--node-ip-address={NODES[HEAD]}", *has)
        ray(WORKER, environment, "start", f"--address={ADDRESS}", f"--node-ip-address={NODES[WORKER]}", *has)
        yield
    finally:
        for node in NODES:
            stop(node)
        shutil.rmtree(folder, ignore_errors=True)


def serve(model: Path, flags: Sequence[str], env: dict[str, str], log: Path) -> Iterator[httpx.Client]:
    """A client of a server on the head's node, through a socket in a file, which all namespaces share."""
    socket = log.with_suffix(".sock")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), f"--uds={socket}", *flags]
    with log.open("wb") as out:
        server = subprocess.Popen(inside(HEAD, *command), env=env, stdout=out, stderr=subprocess.STDOUT)
    client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://node", timeout=300)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            running = server.poll() is None and time.monotonic() < deadline
            assert running, log.read_text(errors="replace")[-6000:]
            time.sleep(0.5)
        yield client
    finally:
        client.close()
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()
        server.wait()


def answers(client: httpx.Client, model: Path) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    more = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    replies = [
        client.post("/v1/completions", json={"model": str(model), "prompt": prompt, **more}) for prompt in PROMPTS
    ]
    return [reply.raise_for_status().json()["choices"][0]["token_ids"] for reply in replies]


@pytest.fixture(scope="module")
def alone(
    network: None, demo_model: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What one process answers."""
    folder = tmp_path_factory.mktemp("alone")
    with contextlib.contextmanager(serve)(demo_model, FLAGS, environment, folder / "server.log") as client:
        return answers(client, demo_model)


def test_the_cpu_platform_names_no_ray_resource() -> None:
    """While this holds, vLLM on a CPU ends with `current platform cpu does not support ray`."""
    from vllm.platforms.cpu import CpuPlatform

    assert CpuPlatform.ray_device_key == ""


@pytest.mark.parametrize("split", ["--tensor-parallel-size=2", "--pipeline-parallel-size=2"])
def test_two_nodes_answer_as_one(
    split: str,
    alone: list[list[int]],
    cluster: None,
    demo_model: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    flags = [*FLAGS, split, "--distributed-executor-backend=ray"]
    log = tmp_path / "server.log"
    with contextlib.contextmanager(serve)(demo_model, flags, environment, log) as client:
        assert answers(client, demo_model) == alone
        said = log.read_text(errors="replace")
        assert f"ip={NODES[WORKER]}" in said, "no worker ran on the other node"
        assert f"distributed_init_method=tcp://{NODES[HEAD]}" in said
