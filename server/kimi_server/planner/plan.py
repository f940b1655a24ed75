"""Chooses the layout of servers and tensor-parallel ranks on a machine that fits most sequences of a given length.

The arithmetic is in `forecast.py`, `weight_bytes.py` and `vllm_kimi_linear.cache.layout`, what is said where nothing
fits in `refusal.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from kimi_server.planner.forecast import Forecast, forecast
from kimi_server.planner.gpus import Machine
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes, check_cache_dtypes, check_device
from vllm_kimi_linear.config.parallel import ParallelSizes

DTYPES = {"cuda": ("bfloat16",), "cpu": ("bfloat16", "float32")}
LEAST_CAPABILITY = (8, 0)  # of a GPU that computes in bfloat16
# Tokens of one step, and the least number of sequences that may run at once: what is planned and the server is told.
BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}
BATCH_SEQUENCES = {"cuda": 256, "cpu": 128}


@dataclass(frozen=True)
class Request:
    """What all servers together are to hold."""

    config: Mapping[str, Any]  # of config.json
    context: int  # tokens
    concurrency: int  # sequences of that length at once
    dtype: str
    kv_cache_dtype: str = "auto"
    state_dtype: str = "auto"
    tensor_parallel: int | None = None  # None: to be chosen
    context_parallel: int = 1  # ranks that the latent KV is spread over
    one_server: bool = False
    quantization: str | None = None  # by which the server makes `config`'s weights from plain ones


@dataclass(frozen=True)
class Layout:
    """Equal servers, each of `tensor_parallel` ranks."""

    servers: int
    batch_sequences: int  # that may run at once on one server
    batch_tokens: int  # of a step; vLLM wants one at least for each of them
    model_sizes: ModelSizes
    tensor_parallel: int
    forecast: Forecast

    def sequences(self, context: int) -> int:
        """How many sequences of `context` tokens fit on all servers at once."""
        return self.servers * self.forecast.sequences(context)

    def spread(self) -> "Layout":
        """The same layout with the latent KV spread over all ranks of a server (decode context parallelism)."""
        # Without prefix caching a sequence has one state.
        plan = replace(self.forecast.plan, context_parallel=self.tensor_parallel, state_pages=1)
        return replace(self, forecast=replace(self.forecast, plan=plan))

    @property
    def ranks(self) -> int:
        """Of all servers."""
        return self.servers * self.tensor_parallel

    def describe(self) -> str:
        servers = "1 server" if self.servers == 1 else f"{self.servers} servers"
        return f"{servers} of {self.tensor_parallel} rank{'' if self.tensor_parallel == 1 else 's'}"


@dataclass(frozen=True)
class Choice:
    request: Request
    machine: Machine
    layouts: tuple[Layout, ...]  # all that can start, by ranks a server

    @property
    def best(self) -> Layout:
        """Most sequences of the asked context; among equals most GPUs, then most cache a server, then fewest ranks."""
        context = self.request.context
        allowed = [each for each in self.layouts if not self.request.one_server or each.servers == 1]
        return max(
            allowed,
            key=lambda each: (each.sequences(context), each.ranks, each.forecast.cache, -each.tensor_parallel),
        )

    @property
    def per_server(self) -> int:
        """The sequences of the asked context that the fullest server has to hold."""
        return ceil(self.request.concurrency / self.best.servers)

    @property
    def fits(self) -> bool:
        return self.best.sequences(self.request.context) >= self.request.concurrency


def choose(request: Request, machine: Machine) -> Choice:
    """All layouts that can start, whether the best fits the request or not.

    Raises ConfigError, in one sentence, for what cannot be served on the machine at all.
    """
    if machine.capability is not None and machine.capability < LEAST_CAPABILITY:
        shown, least = (".".join(map(str, each)) for each in (machine.capability, LEAST_CAPABILITY))
        raise ConfigError(
            f"{machine.short} has compute capability {shown}, and GPUs serve this model in bfloat16 alone, which needs "
            f"{least}; take a GPU from Ampere on, such as A10"
        )
    if request.dtype not in DTYPES[machine.device]:
        remedy = " or ".join(DTYPES[machine.device])
        raise ConfigError(f"--dtype is {request.dtype}; on {machine.device} this model is served in {remedy}")
    try:
        check_cache_dtypes(request.kv_cache_dtype, "auto", request.state_dtype, machine.device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--mamba-ssm-cache-dtype", "--state-dtype")) from None
    model_sizes = ModelSizes.from_config(request.config)
    longest = model_sizes.max_context
    if longest is not None and request.context > longest:
        raise ConfigError(f"--context is {request.context:,}; the model's longest is {longest:,}, ask for that or less")
    return Choice(request, machine, _layouts(request, machine, model_sizes))


def _layouts(request: Request, machine: Machine, model_sizes: ModelSizes) -> tuple[Layout, ...]:
    asked, spread = request.tensor_parallel, request.context_parallel
    if spread > 1 and machine.device == "cpu":
        raise ConfigError(f"--decode-context-parallel is {spread}; it is not implemented on a CPU, leave it out")
    if asked is not None and asked > machine.count:
        raise ConfigError(f"--tensor-parallel is {asked}; give at most the number of GPUs, {machine.count}")
    sizes = [asked] if asked else range(1, machine.count + 1)
    layouts, refusals = [], []
    for ranks in sizes:
        try:
            ParallelSizes(ranks).check(model_sizes)
            check_device(model_sizes, machine.device)
        except ConfigError as error:
            refusals.append(error)
            continue
        if ranks % spread:
            remedy = "it must divide the ranks of a server, give another"
            refusals.append(ConfigError(f"--decode-context-parallel is {spread}; {remedy}"))
            continue
        servers = machine.count // ranks
        found = [_layout(request, machine, model_sizes, ranks, servers)]
        if request.one_server and servers > 1:  # on some of the GPUs
            found.append(_layout(request, machine, model_sizes, ranks, 1))
        layouts += found
    if not layouts:
        raise refusals[0]
    return tuple(layouts)


def _layout(request: Request, machine: Machine, model_sizes: ModelSizes, ranks: int, servers: int) -> Layout:
    batch_sequences = max(BATCH_SEQUENCES[machine.device], ceil(request.concurrency / servers))
    batch_tokens = max(BATCH_TOKENS[machine.device], batch_sequences)
    held = forecast(
        model_sizes,
        memory_bytes=machine.usable,
        dtype=request.dtype,
        device=machine.device,
        batch_tokens=batch_tokens,
        batch_sequences=batch_sequences,
        tensor_parallel=ranks,
        state_dtype="float32" if request.state_dtype == "auto" else request.state_dtype,
        context_parallel=request.context_parallel,
    )
    return Layout(servers, batch_sequences, batch_tokens, model_sizes, ranks, held)


def best_spread(choice: Choice) -> Layout | None:
    """The layout that fits most with its latent KV spread over all its ranks; None where that is not possible."""
    if choice.machine.device == "cpu":
        return None
    spread = [each.spread() for each in choice.layouts if each.tensor_parallel > choice.request.context_parallel]
    return max(spread, key=lambda each: each.sequences(choice.request.context), default=None)
