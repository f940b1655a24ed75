"""Every flag that deploy/ gives `vllm serve` is one of vLLM's, with a value that vLLM takes."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kimi_linear.cache.layout import cache_layout
from vllm_kimi_linear.config.model import ModelSizes

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
CONFIG_48B = DEPLOY.parent / "benchmarks" / "config_48b.json"
# As `plan` and the issue have it: what serving long prompts through the gateway needs.
NEEDED = {
    "enable_force_include_usage": True,
    "enable_prompt_tokens_details": True,
    "scheduling_policy": "priority",
    "sse_keep_alive_interval": 15,
    "shutdown_timeout": 120,
    "tool_call_parser": "kimi_k2",
    "reasoning_parser": "",
}


def configs() -> Iterator[tuple[str, str]]:
    """(where, text) of every file that `vllm serve --config` reads in deploy/."""
    yield "vllm.yaml", (DEPLOY / "vllm.yaml").read_text()
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "ConfigMap" and "vllm.yaml" in document["data"]:
                yield f"kubernetes/{path.name}", document["data"]["vllm.yaml"]


CONFIGS = dict(configs())


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser


def commands(text: str) -> Iterator[list[str]]:
    """The `vllm serve` command lines of a file, continued lines joined and comment signs removed.

    An image of ours runs `vllm serve` unless it is given another entry point.
    """
    joined = re.sub(r"\s*\\\n\s*#?\s*", " ", text)
    image = r"docker run (?![^\n]*--entrypoint)[^\n]*?kimi-linear\S*"
    for found in re.finditer(rf"(?:vllm serve|{image}) ([^\n`&]*)", joined):
        yield found[1].split()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_one_that_vllm_takes(name: str, parser: FlexibleArgumentParser, tmp_path: Path) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(CONFIGS[name])
    parsed = vars(parser.parse_args(["serve", "--config", str(path)]))
    assert parsed["model"] == "/weights/Kimi-Linear-48B-A3B-Instruct"
    assert {key: parsed[key] for key in NEEDED} == NEEDED
    threshold = parsed["long_prefill_token_threshold"]
    assert 0 < threshold <= parsed["max_num_batched_tokens"]
    model_sizes = ModelSizes.from_config(json.loads(CONFIG_48B.read_text()))
    for ranks in {1, 2, 4, 8, parsed["tensor_parallel_size"]}:
        plan = cache_layout(model_sizes, activation_dtype="bfloat16", kv_bytes=0, tensor_parallel=ranks, device="cuda")
        assert threshold % plan.block_tokens == 0, "a chunk would end inside a block"


def test_an_unknown_flag_is_refused(parser: FlexibleArgumentParser, tmp_path: Path) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(CONFIGS["vllm.yaml"] + "no-such-flag: 1\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--config", str(path)])


def test_the_configs_differ_only_in_how_a_server_is_spread() -> None:
    spread = {"tensor-parallel-size", "pipeline-parallel-size", "distributed-executor-backend"}
    loaded = [yaml.safe_load(text) for text in CONFIGS.values()]
    alike = [{key: value for key, value in one.items() if key not in spread} for one in loaded]
    assert all(one == alike[0] for one in alike)


def test_commands_have_flags_of_vllm(parser: FlexibleArgumentParser) -> None:
    files = [path for path in DEPLOY.rglob("*") if path.suffix in {".md", ".yaml", ".sh", ".cpu"}]
    files.append(DEPLOY.parent / "Dockerfile")
    known = {option for action in parser_of_serve(parser)._actions for option in action.option_strings}
    used = {
        word.split("=")[0]
        for path in files
        for words in commands(path.read_text())
        for word in words
        if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)
    }
    assert "--config" in used, "no command was found"
    assert used <= known


def parser_of_serve(parser: FlexibleArgumentParser) -> Any:
    return next(action.choices["serve"] for action in parser._actions if action.choices)


def test_ray_serve_gives_arguments_of_the_engine() -> None:
    service = yaml.safe_load((DEPLOY / "ray/rayservice.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["engine_kwargs"].keys() <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(config["engine_kwargs"]["tensor_parallel_size"])
