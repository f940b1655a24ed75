"""Chooses the layout of servers and tensor-parallel ranks on a machine that fits most sequences of a given length.

The arithmetic is in `forecast.py`, `weight_bytes.py` and `vllm_kimi_linear.cache.layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from kimi_server.planner.forecast import Forecast, forecast
from kimi_server.planner.gpus import Machine
from kimi_server.planner.sizes import gib
from vllm_kimi_linear.cache.layout import longest_context
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes, check_cache_dtypes, check_device
from vllm_kimi_linear.config.parallel import ParallelSizes

DTYPES = {"cuda": ("bfloat16",), "cpu": ("bfloat16", "float32")}
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


@dataclass(frozen=True)
class Layout:
    """Equal servers, each of `tensor_parallel` ranks."""

    servers: int
    batch_sequences: int  # that may run at once on one server
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
        """Most sequences of the asked context; among equals most cache a server, then fewest ranks."""
        allowed = [each for each in self.layouts if not self.request.one_server or each.servers == 1]
        return max(
            allowed,
            key=lambda each: (each.sequences(self.request.context), each.forecast.cache, -each.tensor_parallel),
        )

    @property
    def per_server(self) -> int:
        """The sequences of the asked context that the fullest server has to hold."""
        return ceil(self.request.concurrency / self.best.servers)


def choose(request: Request, machine: Machine) -> Choice:
    """All layouts that can start. Raises ConfigError, in one sentence, where the best does not fit the request."""
    if request.dtype not in DTYPES[machine.device]:
        remedy = " or ".join(DTYPES[machine.device])
        raise ConfigError(f"--dtype is {request.dtype}; on {machine.device} this model is served in {remedy}")
    try:
        check_cache_dtypes(request.kv_cache_dtype, "auto", request.state_dtype, machine.device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--mamba-ssm-cache-dtype", "--state-dtype")) from None
    _check_context(request, ModelSizes.from_config(request.config))
    choice = Choice(request, machine, _layouts(request, machine))
    if choice.best.sequences(request.context) < request.concurrency:
        raise ConfigError(_what_is_short(choice))
    return choice


def _check_context(request: Request, model_sizes: ModelSizes) -> None:
    longest = model_sizes.max_context
    if longest is not None and request.context > longest:
        raise ConfigError(f"--context is {request.context:,}; the model's longest is {longest:,}, ask for that or less")


def _layouts(request: Request, machine: Machine) -> tuple[Layout, ...]:
    asked, spread = request.tensor_parallel, request.context_parallel
    if spread > 1 and machine.device == "cpu":
        raise ConfigError(f"--decode-context-parallel is {spread}; it is not implemented on a CPU, leave it out")
    if asked is not None and machine.count % asked:
        raise ConfigError(f"--tensor-parallel is {asked}; give a divisor of the {machine.count} GPUs")
    sizes = [asked] if asked else [n for n in range(1, machine.count + 1) if machine.count % n == 0]
    sizes = [ranks for ranks in sizes if ranks % spread == 0]
    if not sizes:
        raise ConfigError(f"--decode-context-parallel is {spread}; it must divide the ranks of a server, give another")
    layouts, refusals = [], []
    for ranks in sizes:
        try:
            model_sizes = ModelSizes.from_config(request.config)
            ParallelSizes(ranks).check(model_sizes)
            check_device(model_sizes, machine.device)
        except ConfigError as error:
            refusals.append(error)
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
    held = forecast(
        model_sizes,
        memory_bytes=machine.usable,
        dtype=request.dtype,
        device=machine.device,
        batch_tokens=BATCH_TOKENS[machine.device],
        batch_sequences=batch_sequences,
        tensor_parallel=ranks,
        state_dtype="float32" if request.state_dtype == "auto" else request.state_dtype,
        context_parallel=request.context_parallel,
    )
    return Layout(servers, batch_sequences, model_sizes, ranks, held)


def _what_is_short(choice: Choice) -> str:
    """One sentence: how much memory the best layout lacks, and what would fit."""
    request, best, held = choice.request, choice.best, choice.best.forecast
    sequences, do = ("sequence", "does") if request.concurrency == 1 else ("sequences", "do")
    asked = f"{request.concurrency:,} {sequences} of {request.context:,} tokens {do} not fit"
    short = gib(held.shortage(choice.per_server, request.context))
    if held.cache <= 0:
        before = gib(held.weights + held.activations + held.runtime)
        return (
            f"{asked}: each rank of {best.describe()} needs {before} for weights and activations alone, may use "
            f"{gib(held.memory)}, and is {short} short with the cache; give more or larger GPUs, or more memory"
        )
    remedies = [f"--concurrency {fitting}"] if (fitting := best.sequences(request.context)) else []
    longest = longest_context(request.context, lambda context: best.sequences(context) >= request.concurrency)
    remedies += [f"--context {longest}"] if longest else []
    if (spread := best_spread(choice)) and spread.sequences(request.context) >= request.concurrency:
        remedies += [f"--decode-context-parallel {spread.tensor_parallel}, untried with this model"]
    needed = gib(held.cache_bytes(choice.per_server, request.context))
    return (
        f"{asked}: each rank of {best.describe()} needs {needed} of cache, has {gib(held.cache)}, "
        f"and is {short} short; choose {', or '.join([*remedies, 'more memory'])}"
    )


def best_spread(choice: Choice) -> Layout | None:
    """The layout that fits most with its latent KV spread over all its ranks; None where that is not possible."""
    if choice.machine.device == "cpu":
        return None
    spread = [each.spread() for each in choice.layouts if each.tensor_parallel > choice.request.context_parallel]
    return max(spread, key=lambda each: each.sequences(choice.request.context), default=None)
