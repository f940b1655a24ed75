"""The engines that are compared: ours in vLLM, transformers, and llama.cpp where it is at hand."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu.rows import DECODE_TOKENS, PREFILLS, measure, sizes_of, token_ids

WEIGHTS = {
    "fp8": ("float-quantized", "float", 8),
    "int8": ("int-quantized", "int", 8),
    "int4": ("pack-quantized", "int", 4),
}


def narrow(weights: str) -> dict[str, Any]:
    """config.json's quantization_config of a checkpoint with all linear layers but the output matrix in these."""
    stored, kind, bits = WEIGHTS[weights]
    both = {"num_bits": bits, "type": kind, "symmetric": True}
    shared = {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel"}
    inputs = None if bits == 4 else both | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": both | shared | {"dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"all": group},
        "ignore": ["lm_head"],
    }


def measure_narrow(model: Path, weights: str) -> dict[str, float]:
    """As `measure_ours` in bfloat16, with weights in fewer bits and no values in them."""
    with tempfile.TemporaryDirectory() as folder:
        for file in model.glob("*.json"):
            shutil.copy(file, folder)
        config = json.loads((model / "config.json").read_text()) | {"quantization_config": narrow(weights)}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return measure_ours(Path(folder), "bfloat16", load_format="dummy")


def measure_ours(model: Path, dtype: str, load_format: str = "auto") -> dict[str, float]:
    """Tokens a second through vLLM's engine."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype=dtype,
        load_format=load_format,
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

    found = measure(generate, repeats=3)
    engine.llm_engine.engine_core.shutdown()  # a process waits for its children before it lets go of what stops them
    return found


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
