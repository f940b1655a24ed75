"""A process that serves another model is the same with this plugin as without it, and engines of ours may follow
each other in one process."""

import asyncio
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.own_process import in_own_process

ENGINE = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 16 << 20, "enforce_eager": True}


def serve(model: str) -> dict[str, Any]:
    """What an engine of this model leaves behind in its process: answer, environment, loggers, log."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        from vllm import LLM, SamplingParams
        from vllm.distributed.device_communicators import shm_broadcast
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        llm = LLM(model, distributed_executor_backend="uni", disable_log_stats=False, **ENGINE)
        [found] = llm.generate(
            {"prompt_token_ids": list(range(2, 50))}, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
        )
        loggers = llm.llm_engine.logger_manager.stat_loggers
        with mock.patch("vllm.v1.engine.async_llm.EngineCoreClient.make_async_mp_client"):
            quiet = AsyncLLM.from_engine_args(AsyncEngineArgs(model, disable_log_stats=True, **ENGINE))
        log.seek(0)
        lines = {steady(line) for line in re.split(r"[\r\n]", log.read()) if "Loading safetensors" not in line}
        return {
            "answer": list(found.outputs[0].token_ids),
            "environment": {name: steady(value) for name, value in os.environ.items()},
            "loggers": [type(each).__name__ for each in loggers],
            "counts in spite of --disable-log-stats": quiet.log_stats or quiet.logger_manager is not None,
            "metrics": [sample for sample in metrics() if "kimi" in sample],
            "polls": shm_broadcast.sched_yield.__module__,
            "log": sorted(lines),
        }


def steady(text: str) -> str:
    """The text without what differs from run to run: times, process ids, names of temporary files."""
    return re.sub(r"vllm_mm_\S+|[0-9a-f]{16,}|\d+", "#", text)


def metrics() -> dict[str, float]:
    """Name and labels of each sample at /metrics -> its value."""
    from prometheus_client import generate_latest

    lines = [line.rsplit(" ", 1) for line in generate_latest().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_another_model_is_served_as_without_the_plugin(llama: Path) -> None:
    level = {"VLLM_LOGGING_LEVEL": "INFO"}  # vLLM's default; as it is read early, no process is forked
    without, with_it = (in_own_process(serve, str(llama), **level, **more) for more in ({"VLLM_PLUGINS": ""}, {}))
    assert without["environment"].pop("VLLM_PLUGINS") == ""
    assert len(without["answer"]) == 8
    assert not without["counts in spite of --disable-log-stats"]
    assert with_it == without


def two_engines(model: str) -> list[dict[str, float]]:
    """The metrics of ours that each of two engines in turn shows."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def ask() -> dict[str, float]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **ENGINE))
        try:
            wanted = SamplingParams(temperature=0, max_tokens=2)
            prompt = {"prompt_token_ids": list(range(2, 122))}
            assert [answer async for answer in engine.generate(prompt, wanted, "one")][-1].finished
        finally:
            engine.shutdown()
        return {name.split("{")[0]: value for name, value in metrics().items() if "kimi_linear" in name}

    return [asyncio.run(ask()) for _ in range(2)]


def test_two_engines_in_turn(demo_model: Path) -> None:
    """Each counts for itself: a prompt of one block and a little leaves one or two states."""
    first, second = in_own_process(two_engines, str(demo_model))
    assert first["kimi_linear_snapshots_held"] in (1, 2)
    assert first["kimi_linear_snapshots_evicted_total"] == 0
    created = "kimi_linear_snapshots_evicted_created"
    assert {**first, created: 0} == {**second, created: 0}
