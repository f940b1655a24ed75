"""A plan as flags of `vllm serve`, each with its reason, and as the YAML for its --config."""

import json
from dataclasses import dataclass

from kimi_server.planner.gpus import GPU_SHARE
from kimi_server.planner.plan import BATCH_TOKENS, Choice


@dataclass(frozen=True)
class Setting:
    flag: str  # without the dashes
    value: str | int | float | bool
    reason: str


def settings(choice: Choice) -> list[Setting]:
    """The flags of one server of the chosen layout."""
    request, layout, device = choice.request, choice.best, choice.machine.device
    chosen = [
        Setting("dtype", request.dtype, "of weights, activations and latent KV"),
        Setting("tensor-parallel-size", layout.tensor_parallel, "ranks of this server"),
        *(
            [Setting("decode-context-parallel-size", request.context_parallel, "as asked; untried with this model")]
            if request.context_parallel > 1
            else []
        ),
        Setting("max-model-len", request.context, "the planned context"),
        Setting("max-num-batched-tokens", BATCH_TOKENS[device], "tokens of a step, which size the activations"),
        Setting("max-num-seqs", layout.batch_sequences, "sequences that run at once, where their length lets them"),
        Setting("enable-prefix-caching", True, "a second question to a long document starts where it ends")
        if request.context_parallel == 1
        else Setting("enable-prefix-caching", False, "decode context parallelism is refused with it"),
    ]
    if device == "cuda":
        chosen.append(Setting("gpu-memory-utilization", GPU_SHARE, "the planned share; vLLM measures what it leaves"))
    else:
        cache = layout.forecast.cache
        chosen.append(Setting("kv-cache-memory-bytes", cache, "a rank's cache; else vLLM takes most of the memory"))
    if request.kv_cache_dtype != "auto":
        chosen.append(Setting("kv-cache-dtype", request.kv_cache_dtype, "as asked"))
    if request.state_dtype != "auto":
        chosen.append(Setting("mamba-ssm-cache-dtype", request.state_dtype, "the recurrent state, as asked"))
    block, half = layout.forecast.plan.block_tokens, BATCH_TOKENS[device] // 2
    threshold = max(half // block * block, block)
    if threshold <= request.context:
        reason = f"a long prompt leaves part of a step to others; whole KDA blocks of {block:,} tokens"
        chosen.append(Setting("long-prefill-token-threshold", threshold, reason))
    return [
        *chosen,
        Setting("scheduling-policy", "priority", "the gateway sends short prompts with a better priority"),
        Setting("sse-keep-alive-interval", 15, "seconds; proxies close streams that are silent for a long prefill"),
        Setting("shutdown-timeout", 120, "seconds that running answers get to end in"),
        Setting("enable-prompt-tokens-details", True, "usage says how much of a prompt was cached"),
        Setting("enable-force-include-usage", True, "streams end with their usage, which budgets are kept by"),
        Setting("enable-auto-tool-choice", True, "tools work without being asked for"),
        Setting("tool-call-parser", "kimi_k2", "the format of this model's calls; it takes no reasoning parser"),
    ]


def yaml(choice: Choice, model: str | None) -> str:
    """The YAML for `vllm serve --config`. With `model` None it names none: the command line has to."""
    head = [] if model is None else [Setting("model", model, "what was planned for")]
    lines = [f"{each.flag}: {json.dumps(each.value)}  # {each.reason}" for each in [*head, *settings(choice)]]
    return "\n".join(["# Written by `kimi-linear plan`.", *lines]) + "\n"
