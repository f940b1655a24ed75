"""Where the time of a decode step goes."""

import re
import tempfile
from pathlib import Path

from benchmarks.cpu.rows import DECODE_PROMPT, DECODE_TOKENS, sizes_of, token_ids


def measure_profile(model: Path, sequences: int) -> dict[str, float]:
    """Milliseconds of self time by operation in a decode step of so many sequences, bf16, by vLLM's torch profiler."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=8192,
            kv_cache_memory_bytes=1 << 30,
            enable_prefix_caching=False,
            profiler_config={
                "profiler": "torch",
                "torch_profiler_dir": folder,
                "torch_profiler_with_stack": False,
            },
        )
        vocab = sizes_of(model).vocab_size
        asked = [{"prompt_token_ids": token_ids(DECODE_PROMPT, vocab, seed)} for seed in range(sequences)]
        params = SamplingParams(temperature=0, max_tokens=1 + DECODE_TOKENS, ignore_eos=True)
        engine.generate(asked, params, use_tqdm=False)
        engine.start_profile()
        engine.generate(asked, params, use_tqdm=False)
        engine.stop_profile()
        (report,) = Path(folder).glob("*rank0*.txt")
        return _self_times(report.read_text(), steps=1 + DECODE_TOKENS)


def _self_times(report: str, steps: int) -> dict[str, float]:
    """The twelve operations with the most self time in torch's table, in ms a step."""
    scale = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    times = {}
    for line in report.splitlines():
        row = re.match(r"\s*(\S.*?)\s+[\d.]+%\s+([\d.]+)(us|ms|s)\s+[\d.]+%", line)
        if row:
            times[row[1]] = float(row[2]) * scale[row[3]] / steps
    most = sorted(times, key=lambda name: times[name], reverse=True)[:12]
    return {name: times[name] for name in most}
