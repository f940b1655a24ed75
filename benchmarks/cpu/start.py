"""How long a server takes until it answers."""

import time
from pathlib import Path

from kimi_demo.server import Server


def measure_start(model: Path) -> dict[str, float]:
    """Seconds from `vllm serve` to the first token, by what the log says was reached."""
    from openai import OpenAI

    reached = {
        "API server imported, flags read": "non-default args",
        "engine core imported and configured": "Initializing a V1 LLM engine",
        "worker imported, weights loading": "Starting to load model",
        "weights loaded": "Loading weights took",
        "cache allocated, engine ready": "init engine",
    }
    marks: dict[str, float] = {}
    flags = ["--dtype=float32", "--max-model-len=8192", "--kv-cache-memory-bytes=1G"]
    server = Server(model, flags, log_path=model.parent / "start.log")

    def watch(seconds: float) -> None:
        log = server.log
        for phase, mark in reached.items():
            if phase not in marks and mark in log:
                marks[phase] = seconds

    begun = time.perf_counter()
    with_start = server.start(waiting=watch)
    try:
        watch(time.perf_counter() - begun)
        marks["HTTP answers"] = time.perf_counter() - begun
        client = OpenAI(base_url=f"{with_start.url}/v1", api_key="none")
        client.completions.create(model=server.model, prompt=[40, 41, 42], max_tokens=1)
        marks["first token"] = time.perf_counter() - begun
    finally:
        server.stop()
    return marks
