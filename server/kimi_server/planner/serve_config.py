"""A plan as flags of `vllm serve`, each with its reason, and as the YAML for its --config."""

import json
from dataclasses import dataclass

from kimi_server.planner.gpus import GPU_SHARE
from kimi_server.planner.plan import Choice


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
            [Setting("decode-context-parallel-size", request.context_parallel, "as asked; without prefix caching")]
            if request.context_parallel > 1
            else []
        ),
        Setting("max-model-len", request.context, "the planned context"),
        Setting("max-num-batched-tokens", layout.batch_tokens, "tokens of a step; the activations grow with them"),
        Setting("max-num-seqs", layout.batch_sequences, "most sequences at once; long ones take the place of several"),
        Setting("enable-prefix-caching", True, "a second question about a document does not read it again")
        if request.context_parallel == 1
        else Setting("enable-prefix-caching", False, "decode context parallelism excludes it"),
    ]
    if device == "cuda":
        chosen.append(Setting("gpu-memory-utilization", GPU_SHARE, "the planned share of the GPU's memory"))
    else:
        cache = layout.forecast.cache
        chosen.append(Setting("kv-cache-memory-bytes", cache, "cache of a rank; vLLM's default is most of the memory"))
    if request.kv_cache_dtype != "auto":
        chosen.append(Setting("kv-cache-dtype", request.kv_cache_dtype, "as asked"))
    if request.state_dtype != "auto":
        chosen.append(Setting("mamba-ssm-cache-dtype", request.state_dtype, "the recurrent state, as asked"))
    if request.quantization:
        chosen.append(Setting("quantization", request.quantization, "made of the plain weights while they are loaded"))
    block, half = layout.forecast.plan.block_tokens, layout.batch_tokens // 2
    threshold = max(half // block * block, block)
    if threshold <= request.context:
        reason = f"a long prompt leaves part of a step to others; a multiple of the block of {block:,}"
        chosen.append(Setting("long-prefill-token-threshold", threshold, reason))
    return [
        *chosen,
        Setting("scheduling-policy", "priority", "short prompts first, by the priorities that the gateway sends"),
        Setting("sse-keep-alive-interval", 15, "seconds; keeps a stream open that is silent during a long prefill"),
        Setting("shutdown-timeout", 120, "seconds for running answers to finish"),
        Setting("enable-prompt-tokens-details", True, "usage says how much of a prompt was cached"),
        Setting("enable-force-include-usage", True, "streams end with their usage, which the gateway counts"),
        Setting("enable-auto-tool-choice", True, "the model may call tools"),
        Setting("tool-call-parser", "kimi_k2", "the format of its tool calls; set no reasoning parser"),
    ]


def yaml(choice: Choice, model: str | None) -> str:
    """The YAML for `vllm serve --config`. With `model` None it names none: the command line has to."""
    head = [] if model is None else [Setting("model", model, "what was planned for")]
    lines = [f"{each.flag}: {json.dumps(each.value)}  # {each.reason}" for each in [*head, *settings(choice)]]
    return "\n".join(["# Written by `kimi-linear plan`.", *lines]) + "\n"
