"""What the 48B's cache blocks hold and cost: bytes by arithmetic, and a step of vLLM's scheduler, without a model.

    python -m benchmarks.cache_blocks --out docs/benchmarks/cache-blocks.md

The scheduler is measured against its own way with this model: "stock" is what vLLM 0.32 makes of it, pages of 1,920
tokens in four groups and its own manager of recurrent states. All run the same 64 requests, prompts of 4,096 tokens
read in chunks, then answers of 512 tokens, with prefix caching.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.common import CONFIG, GIB
from kimi_demo.checkpoint import write_checkpoint
from vllm_kimi_linear.cache.layout import cache_layout, kda_state_shapes
from vllm_kimi_linear.cache.policy import kept_boundaries
from vllm_kimi_linear.cache.spec import KdaSpec
from vllm_kimi_linear.config.model import ModelSizes

REQUESTS, PROMPT, ANSWER, TOKENS_A_STEP = 64, 4096, 512, 8192


def cache(model_sizes: ModelSizes, block_tokens: int | None, config: VllmConfig) -> KVCacheConfig:
    """The groups of the 48B in 60 GiB: with our blocks of `block_tokens`, or stock for None."""
    latents = MLAAttentionSpec(
        block_size=block_tokens or 1920, num_kv_heads=1, head_size=model_sizes.latent_size, dtype=torch.bfloat16
    )
    state = MambaSpec(
        shapes=kda_state_shapes(model_sizes),
        dtypes=(torch.bfloat16, torch.float32),
        block_size=block_tokens or 1920,
        mamba_cache_mode="align",
    )
    specs: list[KVCacheSpec]
    if block_tokens is None:
        groups, blocks, specs = 3, 60 * GIB // (7 * latents.page_size_bytes), [latents, state]
    else:
        plan = cache_layout(
            model_sizes, activation_dtype="bfloat16", kv_bytes=60 * GIB, block_tokens=block_tokens, prefix_caching=True
        )
        groups, blocks = plan.kda_groups, plan.num_blocks
        specs = [latents, KdaSpec.of(state, config.model_config.max_model_len, plan)]
    names = [f"kda.{i}" for i in model_sizes.kda_layers]
    layout = [KVCacheGroupSpec([f"mla.{i}" for i in model_sizes.mla_layers], specs[0])]
    layout += [KVCacheGroupSpec(names[group::groups], specs[1]) for group in range(groups)]
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=layout, prefix_cache_retention_interval=0
    )


def answer(step: SchedulerOutput, scheduler: Scheduler) -> ModelRunnerOutput:
    """One made-up token for every request whose prompt is read."""
    names = list(step.num_scheduled_tokens)
    done = {name: scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens for name in names}
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[[7] if done[name] else [] for name in names],
    )


def run(config: VllmConfig, cache_config: KVCacheConfig) -> tuple[list[float], list[float]]:
    """CPU milliseconds of each step while prompts are read, and of each with all requests decoding."""
    block = cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    config.cache_config.block_size = block
    config.cache_config.mamba_block_size = block
    config.cache_config.num_gpu_blocks = cache_config.num_blocks
    scheduler = Scheduler(config, cache_config, StructuredOutputManager(config), block, block)
    hasher = get_request_block_hasher(block, sha256)
    for i in range(REQUESTS):
        prompt = [(i * 7919 + j * 31) % 1000 for j in range(PROMPT)]
        parameters = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        scheduler.add_request(Request(f"r{i}", prompt, parameters, None, block_hasher=hasher))
    reading, decoding = [], []
    gc.collect()
    gc.disable()
    while scheduler.has_unfinished_requests():
        begun = time.thread_time()
        step = scheduler.schedule()
        scheduled = time.thread_time()
        output = answer(step, scheduler)
        told = time.thread_time()
        scheduler.update_from_output(step, output)
        spent = 1e3 * (scheduled - begun + time.thread_time() - told)
        if step.total_num_scheduled_tokens == REQUESTS == len(step.num_scheduled_tokens):
            decoding.append(spent)
        else:
            reading.append(spent)
    gc.enable()
    return reading, decoding


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 544, 1088])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        config = EngineArgs(
            folder,
            dtype="bfloat16",
            max_model_len=32768,
            max_num_batched_tokens=TOKENS_A_STEP,
            max_num_seqs=REQUESTS,
            enable_prefix_caching=True,
        ).create_engine_config()
    init_none_hash(sha256)
    register_all_kvcache_specs(config)
    model_sizes = ModelSizes.from_config(json.loads(CONFIG.read_text()))
    found: dict[int | None, list[tuple[float, float]]] = {block: [] for block in (None, *args.blocks)}
    groups: dict[int | None, int] = {}
    for _ in range(args.rounds):
        for block, rounds in found.items():
            layout = cache(model_sizes, block, config)
            groups[block] = len(layout.kv_cache_groups)
            reading, decoding = run(config, layout)
            rounds.append((statistics.mean(reading), statistics.mean(decoding)))
    table = report(found, groups)
    print(table)
    if args.out:
        args.out.write_text(table)


def report(found: dict[int | None, list[tuple[float, float]]], groups: dict[int | None, int]) -> str:
    return "\n".join([*bytes_table(), "", *scheduler_table(found, groups)]) + "\n"


def bytes_table() -> list[str]:
    lines = [
        "# Cache blocks of the 48B",
        "",
        "    python -m benchmarks.cache_blocks --out docs/benchmarks/cache-blocks.md",
        "",
        "## Bytes, by arithmetic (`cache/layout.py`, `cache/policy.py`)",
        "",
        "bf16, a rank. Waste: what a decoding sequence of 4,096 tokens holds beyond its state and latents.",
        "Checkpoints: the states that a prompt leaves in the prefix cache, all evictable; beside them its latents.",
        "",
        "| ranks | state | block | waste | checkpoints of 4K | of 100K | of 1M | latents of 4K | of 100K | of 1M |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    config = json.loads(CONFIG.read_text())
    lengths = (4 * 1024, 100 * 1024, 1024 * 1024)
    for state in ("float32", "bfloat16"):
        for ranks in (1, 2, 4, 8):
            model_sizes = ModelSizes.from_config(config)
            plan = cache_layout(
                model_sizes,
                activation_dtype="bfloat16",
                kv_bytes=0,
                tensor_parallel=ranks,
                state_dtype=state,
                device="cuda",
            )
            needed = plan.kda_state_bytes_per_sequence + lengths[0] * plan.mla_bytes_per_token
            waste = plan.bytes_per_sequence(lengths[0]) / needed - 1
            kept = [len(kept_boundaries(length // plan.block_tokens)) for length in lengths]
            checkpoints = [f"{count}, {count * plan.checkpoint_bytes / GIB:.2f} GiB" for count in kept]
            latents = [f"{length * plan.mla_bytes_per_token / GIB:.2f} GiB" for length in lengths]
            cells = [str(ranks), state, f"{plan.block_tokens} tokens", f"{waste:.1%}", *checkpoints, *latents]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def scheduler_table(found: dict[int | None, list[tuple[float, float]]], groups: dict[int | None, int]) -> list[str]:
    stock = [statistics.median(column) for column in zip(*found[None], strict=True)]
    lines = [
        "## A step of the scheduler",
        "",
        f"{REQUESTS} requests of {PROMPT:,} tokens in and {ANSWER} out, one rank, fp32 state; medians over "
        f"{len(found[None])} runs of each",
        "run's mean, in milliseconds of CPU a step; in brackets the ratio to stock. While prompts are read a step",
        "publishes every state that is kept, of each layer; stock keeps one or two a prompt.",
        "",
        "| blocks | groups | reading prompts | all decoding |",
        "| --- | --- | --- | --- |",
    ]
    for block, rounds in found.items():
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        shown = [f"{ms:.2f} ({ms / base:.2f})" for ms, base in zip(times, stock, strict=True)]
        name = f"{block:,} tokens" if block else "stock, 1,920 tokens"
        lines.append(f"| {name} | {groups[block]} | {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    main()
