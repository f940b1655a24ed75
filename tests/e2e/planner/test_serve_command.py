"""`kimi-linear serve` starts vLLM with what it planned, and the engine allocates just that."""

import json
import re
import sys
from pathlib import Path

import httpx
import pytest

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.presets import demo_config
from kimi_demo.server import Server
from kimi_server.planner.forecast import forecast
from tests.conftest import TWO_WORKERS
from tests.support import patience
from tests.support.completions import Completions
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

K, MIB = 1 << 10, 1 << 20
CONTEXT = 8 * K


class Planned(Server):
    """`kimi-linear serve`, which becomes `vllm serve`."""

    @property
    def command(self) -> list[str]:
        place = ["--", "--host", "127.0.0.1", "--port", str(self.port)]
        return [sys.executable, "-m", "kimi_server.cli", "serve", self.model, *self.flags, *place]


def flags(ranks: int) -> list[str]:
    return [
        *("--device", "cpu", "--memory", "256M", "--tensor-parallel", str(ranks)),
        *("--dtype", "float32", "--context", "8K", "--concurrency", "2"),
    ]


def check_start(model: Path, preset: str, ranks: int, log: Path) -> None:
    model_sizes = ModelSizes.from_config(demo_config(preset))
    held = forecast(
        model_sizes,
        memory_bytes=256 * MIB,
        dtype="float32",
        device="cpu",
        batch_tokens=2048,
        batch_sequences=128,
        tensor_parallel=ranks,
    )
    env = {"OMP_NUM_THREADS": "1", **(TWO_WORKERS if ranks > 1 else {})}
    with Planned(model, flags(ranks), log_path=log, env=env) as server:
        [line] = re.findall(r"Kimi Linear: (the cache .*)", server.log)
        assert line == held.plan.describe(CONTEXT)
        [labels] = re.findall(r"vllm:cache_config_info\{(.*)\}", Completions(server).metrics())
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert int(found["num_gpu_blocks"]) == held.plan.num_blocks
        assert int(found["block_size"]) == held.plan.block_tokens
        assert int(found["kv_cache_memory_bytes"]) == held.cache
        check_table(server.log, held.weights, held.plan.sequences(4 * K))
        check_answers(server)


def check_table(log: str, weights: int, fitting: int) -> None:
    """The plan was printed before the start, with these figures."""
    table = log[: log.index("Start\n")]
    row = re.search(r"^  weights +([\d.]+)", table, re.MULTILINE)
    assert row and float(row[1]) == pytest.approx(weights / 2**30, abs=0.001)
    fits = re.search(r"chosen +(\d+)", table)
    assert fits and int(fits[1]) == fitting


def check_answers(server: Server) -> None:
    """What the plan set is in force: usage in every stream, with what was cached, and priorities."""
    body = {
        "model": server.model,
        "prompt": list(range(100, 400)),
        "max_tokens": 2,
        "stream": True,
        "priority": 5,
    }
    for cached in (False, True):
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=patience.SECONDS, trust_env=False)
        assert reply.status_code == 200, reply.text
        *_, last, done = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data:")]
        assert done == "[DONE]"
        usage = json.loads(last)["usage"]
        assert usage["prompt_tokens"] == 300
        assert ((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) > 0) == cached


def test_serve_starts_what_was_planned(demo_model: Path, tmp_path: Path) -> None:
    check_start(demo_model, "demo", 1, tmp_path / "server.log")


@pytest.mark.soak
@pytest.mark.parametrize("preset", ["demo", "one-mla", "dense"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_plan_is_what_the_engine_allocates(tmp_path: Path, preset: str, ranks: int) -> None:
    write_checkpoint(tmp_path / "model", preset)
    check_start(tmp_path / "model", preset, ranks, tmp_path / "server.log")


def test_what_cannot_fit_starts_nothing(demo_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from kimi_server.cli import main

    assert main(["serve", str(demo_model), "--device", "cpu", "--memory", "256M", "--context", "1M"]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    [line] = error.splitlines()
    assert re.match(
        r"kimi-linear serve: 1 document of 1M does not fit on a CPU that may use 0.25 GiB: .* choose --context \d+",
        line,
    )


def test_memory_is_not_promised_twice() -> None:
    """Weights, activations and cache of the tests above are all of the memory that was given."""
    model_sizes = ModelSizes.from_config(demo_config())
    held = forecast(
        model_sizes, memory_bytes=256 * MIB, dtype="float32", device="cpu", batch_tokens=2048, batch_sequences=128
    )
    block = held.cache_bytes(1, CONTEXT) - layout.cache_layout(
        model_sizes, activation_dtype="float32", kv_bytes=0, prefix_caching=True
    ).bytes_per_sequence(CONTEXT)
    assert held.memory - block < held.weights + held.activations + held.plan.num_blocks * block <= held.memory
