"""Ray beyond one machine: one server over two nodes answers as one process does, and so does Ray Serve."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import FLAGS
from tests.e2e.deploy import ray_nodes

RAY_SERVICE = Path(__file__).resolve().parents[3] / "deploy/ray/rayservice.yaml"
PROMPTS = [[5 + 7 * i % 500 for i in range(length)] for length in (1, 5, 130, 1500)]
ASKED = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
# Ray Serve listens inside the head's namespace; the request goes where a socket in a file cannot.
ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.stdin.buffer.read(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=900).read().decode())
"""
SERVE = """
import json, sys, time
from ray import serve
from ray.serve.llm import build_openai_app
serve.run(build_openai_app(json.load(sys.stdin)))
print("serving", flush=True)
time.sleep(3600)
"""
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not importlib.util.find_spec("ray"),
        reason="needs root, ip and the extra `ray`",
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ray_nodes.environment(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    with ray_nodes.network():
        yield


@pytest.fixture(scope="module")
def cluster(network: None, environment: dict[str, str]) -> Iterator[None]:
    with ray_nodes.cluster(environment):
        yield


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A process that is asked to end, then made to."""
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


@contextlib.contextmanager
def serve(model: Path, flags: Sequence[str], env: dict[str, str], log: Path) -> Iterator[httpx.Client]:
    """A client of a server on the head's node, through a socket in a file, which all namespaces share."""
    socket = log.with_suffix(".sock")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), f"--uds={socket}", *flags]
    with (
        log.open("wb") as out,
        ended(
            subprocess.Popen(ray_nodes.inside(ray_nodes.HEAD, *command), env=env, stdout=out, stderr=subprocess.STDOUT)
        ) as server,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://node", timeout=900) as client,
    ):
        deadline = time.monotonic() + 900
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            running = server.poll() is None and time.monotonic() < deadline
            assert running, log.read_text(errors="replace")[-6000:]
            time.sleep(0.5)
        yield client


def answers(client: httpx.Client, model: Path) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    replies = [
        client.post("/v1/completions", json={"model": str(model), "prompt": prompt, **ASKED}) for prompt in PROMPTS
    ]
    return [reply.raise_for_status().json()["choices"][0]["token_ids"] for reply in replies]


@pytest.fixture(scope="module")
def alone(
    network: None, demo_model: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What one process answers."""
    log = tmp_path_factory.mktemp("alone") / "server.log"
    with serve(demo_model, FLAGS, environment, log) as client:
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
    with serve(demo_model, flags, environment, log) as client:
        assert answers(client, demo_model) == alone
        said = log.read_text(errors="replace")
        assert f"ip={ray_nodes.NODES[ray_nodes.WORKER]}" in said, "no worker ran on the other node"
        assert f"distributed_init_method=tcp://{ray_nodes.NODES[ray_nodes.HEAD]}" in said


def test_ray_serve_answers_as_vllm(
    alone: list[list[int]], cluster: None, demo_model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The application of rayservice.yaml with the demo checkpoint, one rank and a small cache."""
    pytest.importorskip("ray.serve.llm", reason="needs the whole extra `ray`", exc_type=ImportError)
    service = yaml.safe_load(RAY_SERVICE.read_text())["spec"]["serveConfigV2"]
    (application,) = yaml.safe_load(service)["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (config,) = application["args"]["llm_configs"]
    config["model_loading_config"]["model_source"] = str(demo_model)
    config["engine_kwargs"] |= {"dtype": "float32", "tensor_parallel_size": 1, "max_model_len": 8192}
    config["engine_kwargs"] |= {"kv_cache_memory_bytes": 256 << 20, "max_num_batched_tokens": 1024}
    config["engine_kwargs"] |= {"long_prefill_token_threshold": 512}
    config["deployment_config"]["graceful_shutdown_timeout_s"] = 1
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        command = ray_nodes.inside(ray_nodes.HEAD, sys.executable, "-c", SERVE)
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out)
    with ended(process):
        assert process.stdin
        process.stdin.write(json.dumps(application["args"]).encode())
        process.stdin.close()
        deadline = time.monotonic() + 900
        while "\nserving\n" not in (said := log.read_text(errors="replace")):
            assert process.poll() is None and time.monotonic() < deadline, said[-6000:]
            time.sleep(1)
        for prompt, answer in zip(PROMPTS, alone, strict=True):
            body = {"model": config["model_loading_config"]["model_id"], "prompt": prompt, **ASKED}
            url = "http://127.0.0.1:8000/v1/completions"
            command = ray_nodes.inside(ray_nodes.HEAD, sys.executable, "-c", ASK, url)
            reply = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True)
            assert json.loads(reply.stdout)["choices"][0]["token_ids"] == answer
