"""The engines that are compared: ours in vLLM, transformers, and llama.cpp where it is at hand."""

import json
import subprocess
from pathlib import Path

from benchmarks.cpu.rows import DECODE_TOKENS, PREFILLS, measure, sizes_of, token_ids


def measure_ours(model: Path, dtype: str) -> dict[str, float]:
    """Tokens a second through vLLM's engine."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype=dtype,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    vocab = sizes_of(model).vocab_size
    seeds = iter(range(1 << 30))

    def generate(sequences: int, prompt: int, tokens: int) -> None:
        prompts = [{"prompt_token_ids": token_ids(prompt, vocab, next(seeds))} for _ in range(sequences)]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)

    return measure(generate, repeats=3)


def measure_transformers(model: Path, dtype: str) -> dict[str, float]:
    """Tokens a second of transformers' generate, sequences of equal length in one batch."""
    import torch

    from kimi_demo.reference import HfReference

    reference = HfReference(model, getattr(torch, dtype)).model
    vocab = reference.config.vocab_size
    seeds = iter(range(1 << 30))

    @torch.inference_mode()
    def generate(sequences: int, prompt: int, tokens: int) -> None:
        ids = torch.tensor([token_ids(prompt, vocab, next(seeds)) for _ in range(sequences)])
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )

    return measure(generate, repeats=1)


def measure_llama(binary: Path, gguf: Path) -> dict[str, float]:
    """Tokens a second of llama.cpp's own benchmark, where a binary and a converted model are given."""
    result = {}
    for length in PREFILLS:
        rows = _llama_rows(binary, gguf, "-p", str(length), "-n", "0")
        result[f"prefill {length}"] = rows[0]["avg_ts"]
    result["decode 1"] = _llama_rows(binary, gguf, "-p", "0", "-n", str(DECODE_TOKENS))[0]["avg_ts"]
    return result


def _llama_rows(binary: Path, gguf: Path, *flags: str) -> list[dict]:
    command = [str(binary), "-m", str(gguf), "-o", "json", *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
