"""What is measured of every engine, a row of the table each."""

import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm_kimi_linear.config.model import ModelSizes

PREFILLS = (512, 4096)
DECODES = (1, 16)
DECODE_PROMPT, DECODE_TOKENS = 16, 32


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` timings, after one untimed call."""
    call()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def sizes_of(model: Path) -> ModelSizes:
    return ModelSizes.from_config(json.loads((model / "config.json").read_text()))


def token_ids(count: int, vocab: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(32, vocab - 64), k=count)


def measure(generate: Callable[[int, int, int], None], repeats: int) -> dict[str, float]:
    """Prefill: prompt tokens over the time of the first token. Decode: further tokens over their extra time."""
    result = {}
    generate(1, 64, 4)
    for length in PREFILLS:
        result[f"prefill {length}"] = length / median_seconds(partial(generate, 1, length, 1), repeats)
    for sequences in DECODES:
        first = median_seconds(partial(generate, sequences, DECODE_PROMPT, 1), repeats)
        whole = median_seconds(partial(generate, sequences, DECODE_PROMPT, 1 + DECODE_TOKENS), repeats)
        result[f"decode {sequences}"] = sequences * DECODE_TOKENS / (whole - first)
    return result
