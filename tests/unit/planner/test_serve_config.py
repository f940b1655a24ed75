"""The YAML of a plan, read by vLLM's own parser: every key is a flag there, and its value arrives."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.presets import demo_config
from kimi_server.planner.gpus import machine
from kimi_server.planner.plan import BATCH_TOKENS, Request, choose
from kimi_server.planner.serve_config import settings, yaml
from kimi_server.planner.stored import WHILE_LOADING
from vllm_kimi_linear.config.flags import QUANTIZATIONS

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
# Set whatever is asked, because long prompts need them and people forget them.
ALWAYS = {
    "sse-keep-alive-interval",
    "shutdown-timeout",
    "enable-prompt-tokens-details",
    "enable-force-include-usage",
    "long-prefill-token-threshold",
    "scheduling-policy",
    "enable-auto-tool-choice",
    "tool-call-parser",
    "enable-prefix-caching",
}


def chosen(device: str, **more: Any):
    place = ("cuda", "4xH200", None, 1) if device == "cuda" else ("cpu", None, "2G", 1)
    config = CONFIG_48B if device == "cuda" else demo_config()
    asked: dict[str, Any] = {"config": config, "context": 131072, "concurrency": 2, "dtype": "bfloat16"}
    return choose(Request(**asked | more), machine(*place))


CASES = {
    "GPU": chosen("cuda"),
    "GPU, everything asked": chosen("cuda", state_dtype="bfloat16", tensor_parallel=2, context_parallel=2),
    "GPU, quantised by the start": chosen("cuda", quantization=WHILE_LOADING["fp8"]),
    "CPU": chosen("cpu"),
    "CPU, everything asked": chosen("cpu", state_dtype="float32", dtype="float32"),
}


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("case", CASES)
def test_vllm_reads_every_key(parser, tmp_path: Path, case: str) -> None:
    choice, file = CASES[case], tmp_path / "serve.yaml"
    file.write_text(yaml(choice, "some/model"))
    args = vars(parser.parse_args(["--config", str(file)]))
    for each in settings(choice):
        assert args[each.flag.replace("-", "_")] == each.value, each.flag
    assert args["model"] == "some/model"
    assert args["reasoning_parser"] == ""
    assert not args["trust_remote_code"]


@pytest.mark.parametrize("case", CASES)
def test_what_long_prompts_need_is_set(case: str) -> None:
    flags = {each.flag: each.value for each in settings(CASES[case])}
    assert flags.keys() >= ALWAYS
    assert flags["tool-call-parser"] == "kimi_k2"
    assert flags["scheduling-policy"] == "priority"
    assert "reasoning-parser" not in flags
    # The plugin refuses both together.
    assert flags["enable-prefix-caching"] is ("decode-context-parallel-size" not in flags)
    assert all(each.reason for each in settings(CASES[case]))


def test_the_threshold_is_whole_kda_blocks_and_leaves_room_in_a_step() -> None:
    for device, context in itertools.product(("cuda", "cpu"), (100, 4096, 131072)):
        choice = chosen(device, context=context)
        flags = {each.flag: each.value for each in settings(choice)}
        block = choice.best.forecast.plan.block_tokens
        threshold = flags.get("long-prefill-token-threshold")
        if threshold is None:  # vLLM takes none above the context
            assert context < BATCH_TOKENS[device] // 2 + block
            continue
        assert isinstance(threshold, int)
        assert block <= threshold <= context
        assert threshold % block == 0
        assert threshold == block or threshold <= BATCH_TOKENS[device] // 2


def test_the_asked_concurrency_may_run_at_once_and_is_counted() -> None:
    few, many = (chosen("cuda", context=4096, tensor_parallel=4, concurrency=count) for count in (2, 1500))
    counts = [{each.flag: each.value for each in settings(choice)}["max-num-seqs"] for choice in (few, many)]
    assert counts == [256, 1500]
    assert many.best.forecast.activations > few.best.forecast.activations


def test_a_step_has_a_token_for_each_sequence() -> None:
    """vLLM refuses fewer."""
    for device, count in (("cuda", 9000), ("cpu", 2500)):
        flags = {each.flag: each.value for each in settings(chosen(device, context=256, concurrency=count))}
        assert flags["max-num-seqs"] == flags["max-num-batched-tokens"] == count


def test_a_file_without_a_model_names_none(tmp_path: Path) -> None:
    assert "model" not in {line.split(":")[0] for line in yaml(CASES["CPU"], None).splitlines()}


def test_the_plugin_takes_what_a_start_quantises_by() -> None:
    assert {*WHILE_LOADING.values()} <= {*QUANTIZATIONS["cuda"]}
