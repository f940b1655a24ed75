"""A body of many faulty items is refused for the first of them; servers of other models are as vLLM makes them."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support import patience
from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches import first_faults

COUNT = 2000
# (path, body, faults of the items when all of them are collected)
MANY: dict[str, tuple[str, dict[str, Any], int]] = {
    "messages": ("/v1/chat/completions", {"messages": [{}] * COUNT}, 15 * COUNT),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}] * COUNT}, COUNT),
    "ids": ("/v1/completions", {"prompt": [[1.5] * COUNT]}, COUNT),
    "Messages API": ("/v1/messages", {"max_tokens": 1, "messages": [{}] * COUNT}, 2 * COUNT),
}


@pytest.fixture(scope="module")
def client():
    """`client(architecture)`: of vLLM's own app, without an engine."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    first_faults.PATCH.apply()
    patched = entry.build_app
    first_faults.PATCH.apply()
    assert entry.build_app is patched
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    made: dict[str, TestClient] = {}

    def client(architecture: str) -> TestClient:
        if architecture not in made:
            model = SimpleNamespace(architecture=architecture, get_pooling_task=lambda tasks: None)
            app = entry.build_app(args, ("generate",), model)
            made[architecture] = TestClient(app, raise_server_exceptions=False)
        return made[architecture]

    return client


def faults(client: Any, path: str, body: dict[str, Any]) -> int:
    reply = client.post(path, json={"model": "m", **body})
    assert reply.status_code == 400, reply.text
    found = re.match(r"(\d+) validation errors?:\n", reply.json()["error"]["message"])
    assert found, reply.text
    return int(found[1])


@pytest.mark.parametrize("what", MANY)
def test_a_list_is_left_at_its_first_fault(client, what: str) -> None:
    path, body, most = MANY[what]
    assert faults(client(ARCHITECTURE), path, body) < 20
    assert faults(client("LlamaForCausalLM"), path, body) >= most  # and in this process no model was changed


@pytest.mark.parametrize("architecture", [ARCHITECTURE, "LlamaForCausalLM"])
def test_what_is_right_is_taken(client, architecture: str) -> None:
    """As far as the engine, which is not there."""
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 3, "stop": ["a", "b"]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": [[1, 2], [3]]})):
        reply = client(architecture).post(path, json={"model": "m", **body})
        assert reply.status_code == 500 and "openai_serving" in reply.text, reply.text


def test_a_server_does_so(servers: Callable[..., Server], demo_model: Path) -> None:
    path, body, _ = MANY["messages"]
    with httpx.Client(base_url=servers(demo_model, *FLAGS).url, timeout=patience.SECONDS, trust_env=False) as client:
        assert faults(client, path, body) < 20
