"""Other programs in front of the same servers, each from an environment of its own.

python -m venv ROUTER; ROUTER/bin/pip install vllm-router
python -m venv LITELLM; LITELLM/bin/pip install 'litellm[proxy]'
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gateway.process import wait_for
from kimi_demo.server import free_port

TITLES = {"vllm-router": "vLLM's router", "litellm": "LiteLLM"}  # by the program's name


def command_of(program: Path, urls: Sequence[str], model: str, port: int, folder: Path) -> tuple[list[str], str]:
    """What starts a program in front of servers of `model`, and the path that answers when it is ready."""
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    if program.name == "vllm-router":
        policy = "power_of_two" if len(urls) > 1 else "round_robin"  # by their load
        command = [str(program), *listen, "--worker-urls", *urls, "--policy", policy]
        return [*command, "--prometheus-port", str(free_port()), "--log-level", "warning"], "/health"
    models = [
        {
            "model_name": model,
            "litellm_params": {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in urls
    ]
    config = folder / "litellm.yaml"
    settings = {
        "model_list": models,
        "router_settings": {"routing_strategy": "least-busy"},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    config.write_text(json.dumps(settings))
    return [str(program), *listen, "--config", str(config)], "/health/liveliness"


@contextlib.contextmanager
def peer(program: Path, urls: Sequence[str], model: str, folder: Path) -> Iterator[str]:
    """A program in front of these servers; its URL."""
    port = free_port()
    command, ready = command_of(program, urls, model, port, folder)
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("PYTHONPATH", "LITELLM_LOG"):
        env.pop(name, None)
    with (folder / f"{program.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            wait_for(f"http://127.0.0.1:{port}{ready}", process, 120)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(90)
