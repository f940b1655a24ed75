"""What starts the servers of a plan: one shell line each."""

import shlex
from collections.abc import Sequence

from kimi_server.planner.plan import Choice

TRUST = "--trust-remote-code"


def vllm_commands(choice: Choice, model: str | None, config: str) -> list[str]:
    """`vllm serve` with the plan's YAML; without a model that can be served, MODEL stands for one."""
    named = [] if model else ["MODEL"]
    return [
        where + shlex.join(["vllm", "serve", *named, "--config", config, *_trust(choice), "--port", str(port)])
        for where, port in _servers(choice)
    ]


def serve_commands(choice: Choice, model: str | None, flags: Sequence[str]) -> list[str]:
    """`kimi-linear serve`, which plans for the GPUs that it sees. `flags` are the request's, as they were given."""
    best, lines = choice.best, []
    ranks = ["--tensor-parallel", str(best.tensor_parallel)] if choice.machine.count > 1 else []
    concurrency = ["--concurrency", str(choice.per_server)] if choice.per_server > 1 else []
    for where, port in _servers(choice):
        further = [*_trust(choice), *(["--port", str(port)] if best.servers > 1 else [])]
        command = ["kimi-linear", "serve", model or "MODEL", *ranks, *flags, *concurrency]
        lines.append(where + shlex.join([*command, *(["--", *further] if further else [])]))
    return lines


def _servers(choice: Choice) -> list[tuple[str, int]]:
    """For each server the environment that gives it its GPUs, and its port."""
    best, ranks = choice.best, choice.best.tensor_parallel
    servers = []
    for index in range(best.servers):
        gpus = ",".join(str(index * ranks + rank) for rank in range(ranks))
        some = choice.machine.device == "cuda" and ranks < choice.machine.count
        servers.append((f"CUDA_VISIBLE_DEVICES={gpus} " if some else "", 8000 + index))
    return servers


def _trust(choice: Choice) -> list[str]:
    """The checkpoint's tokenizer is code of its own."""
    return [TRUST] if "auto_map" in choice.request.config else []
