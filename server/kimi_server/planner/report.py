"""A plan as text: memory by rank, what fits, and why."""

import json
from collections.abc import Sequence

from kimi_server.planner import refusal
from kimi_server.planner.plan import Choice, Layout, best_spread
from kimi_server.planner.remedies import Remedy
from kimi_server.planner.serve_config import settings
from kimi_server.planner.sizes import documents, gib, tokens
from kimi_server.planner.stored import GUIDE
from vllm_kimi_linear.cache.layout import GIB, MIB

CONTEXTS = (4 << 10, 128 << 10, 1 << 20)


def report(choice: Choice) -> str:
    """All of a plan that fits but its first line, without a newline at its end."""
    parts = [_head(choice), _memory(choice), _fits(choice, contexts(choice)), _reasons(choice), _flags(choice)]
    return "\n\n".join("\n".join(part) for part in parts)


def refused(choice: Choice, found: Sequence[Remedy]) -> str:
    """The same of one that does not fit."""
    parts = [[*_head(choice)[:-1], f"Short: {refusal.shortage(choice)}"]]
    if found:
        parts.append(refusal.table(choice, found, contexts(choice)))
    if any(each.weights for each in found):
        parts.append([f"`--weights` plans for smaller weights; {GUIDE} says where to get them."])
    return "\n\n".join("\n".join(part) for part in parts)


def contexts(choice: Choice) -> list[int]:
    """The lengths that a table has: those that the model reads, and the one that was asked for."""
    longest = choice.best.model_sizes.max_context
    return sorted({each for each in CONTEXTS if longest is None or each <= longest} | {choice.request.context})


def _head(choice: Choice) -> list[str]:
    request, model_sizes = choice.request, choice.best.model_sizes
    state = "float32" if request.state_dtype == "auto" else request.state_dtype
    return [
        f"Model: {len(model_sizes.kda_layers)} KDA and {len(model_sizes.mla_layers)} MLA layers in {request.dtype}, "
        f"recurrent state in {state}",
        f"Machine: {choice.machine.describe()}",
        f"Asked for: {documents(request.concurrency, request.context)} at once",
        f"Chosen: {choice.best.describe()}",
    ]


def _memory(choice: Choice) -> list[str]:
    context, held, ranks = choice.request.context, choice.best.forecast, choice.best.tensor_parallel
    count = choice.per_server
    kda, latent = held.kda_bytes(count), held.latent_bytes(count, context)
    cache = held.cache_bytes(count, context)
    rows = [
        ("weights", held.weights),
        ("activations, estimated", held.activations),
        ("runtime, allowance", held.runtime),
        ("KDA state", kda),
        ("latent KV", latent),
        ("padding of cache blocks", cache - kda - latent),
        ("headroom", held.cache - cache),
        ("in all", held.memory),
    ]
    names = ["rank 0"] if ranks == 1 else [f"rank {rank}" for rank in range(ranks)]
    title = f"Memory of a server with {documents(count, context)}, GiB"
    body = [f"  {name:<24}" + "".join(f"{size / GIB:>10.3f}" for _ in names) for name, size in rows]
    return [title, " " * 26 + "".join(f"{name:>10}" for name in names), *body]


def _fits(choice: Choice, contexts: Sequence[int]) -> list[str]:
    rows = [
        f"  {each.describe() + (', chosen' if each is choice.best else ''):<32}"
        + "".join(f"{each.sequences(context):>10,}" for context in contexts)
        for each in choice.layouts
    ]
    return ["Sequences that fit at once", " " * 34 + "".join(f"{tokens(each):>10}" for each in contexts), *rows]


def _reasons(choice: Choice) -> list[str]:
    request, best, plan = choice.request, choice.best, choice.best.forecast.plan
    held_by = "every rank" if request.context_parallel == 1 else f"one in {request.context_parallel} ranks"
    reasons = [
        f"A sequence takes {plan.kda_state_bytes_per_sequence / MIB:.2f} MiB of KDA state on a rank, whatever its "
        f"length, and {plan.mla_bytes_per_token:,} bytes a token of latent KV, which {held_by} holds: more tensor "
        "parallelism shrinks weights and state, not the latent KV.",
        *_comparisons(choice),
    ]
    if best.ranks < choice.machine.count:
        reasons.append(_idle(choice))
    if best.servers > 1:
        reasons.append(f"The {best.servers} servers are replicas for the gateway, each with all weights on its GPUs.")
    if (spread := best_spread(choice)) and spread.sequences(request.context) > best.sequences(request.context):
        reasons.append(
            f"Decode context parallelism holds more, because it spreads the latent KV: {spread.describe()} with "
            f"--decode-context-parallel {spread.tensor_parallel} would hold {spread.sequences(request.context):,} of "
            f"{tokens(request.context)}. It excludes prefix caching, so it is used only on request."
        )
    if "auto_map" in request.config:
        reasons.append("The checkpoint brings code of its own: --trust-remote-code runs it, so read it first.")
    if choice.machine.device == "cpu" and best.tensor_parallel > 1:
        reasons.append('Set VLLM_CPU_OMP_THREADS_BIND to one group of cores a rank, for example "0|1".')
    return ["Why", *(f"- {reason}" for reason in reasons)]


def _comparisons(choice: Choice) -> list[str]:
    """What the best layout of more replicas would hold, and the best of more tensor parallelism."""
    best, context = choice.best, choice.request.context
    reasons = []
    for name, layouts in (
        ("More replicas", [each for each in choice.layouts if each.servers > best.servers]),
        ("More tensor parallelism", [each for each in choice.layouts if each.tensor_parallel > best.tensor_parallel]),
    ):
        if layouts:
            other = max(layouts, key=lambda each: each.sequences(context))
            here, there = best.sequences(context), other.sequences(context)
            text = f"{name}: {other.describe()} would hold {there:,} of {tokens(context)}, the chosen layout {here:,}."
            if there > here:  # where one server was asked for
                text += " To have them, use `kimi-linear plan` and the gateway."
            elif there == here:
                text += f" The chosen one {_better(best, other)}."
            reasons.append(text)
    return reasons


def _idle(choice: Choice) -> str:
    """Why some GPUs are not used."""
    best, count = choice.best, choice.machine.count
    used = f"{best.ranks} of the {count} GPUs are used"
    if choice.request.one_server and best.ranks + best.tensor_parallel <= count:
        return f"{used}: `kimi-linear serve` starts one server."
    heads = best.model_sizes.attention_heads
    if heads % count:
        return f"{used}: {count} ranks cannot divide the model's {heads} heads evenly."
    return f"{used}: no layout that uses all of them holds more."


def _better(best: Layout, other: Layout) -> str:
    """What decided between two that hold as many."""
    if best.ranks > other.ranks:
        return f"uses {best.ranks} GPUs, not {other.ranks}"
    here, there = (max(each.forecast.cache, 0) for each in (best, other))
    return f"leaves each server more cache: {gib(here)}, not {gib(there)}" if here > there else "takes fewer ranks"


def _flags(choice: Choice) -> list[str]:
    rows = [(f"{each.flag}: {json.dumps(each.value)}", each.reason) for each in settings(choice)]
    return ["Flags of each server", *(f"  {flag:<36}{reason}" for flag, reason in rows)]
