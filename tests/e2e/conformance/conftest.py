"""The conformance suite's server, client and table.

    pytest tests/e2e/conformance                                   against a server of its own
    pytest tests/e2e/conformance --base-url http://HOST:PORT/v1    against one of the demo checkpoint that runs already,
                                                               behind a gateway for example
    pytest tests/e2e/conformance --write-table                     writes docs/conformance.md as well

`KIMI_BASE_URL` in the environment does what --base-url does.
"""

import os
import platform
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import FLAGS
from tests.support import patience
from tests.support.replies import CHAT, GREEDY, PROMPT

TABLE = Path(__file__).parents[3] / "docs" / "conformance.md"
COMMAND = "pytest tests/e2e/conformance --write-table"

RESULTS: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--base-url", metavar="URL", help="test the OpenAI API at URL (ends in /v1)")
    group.addoption("--write-table", action="store_true", help="write docs/conformance.md from the results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(feature, request): one row of docs/conformance.md")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    row = item.get_closest_marker("conformance")
    if row is not None and (report.when == "call" or report.outcome != "passed"):
        answer = dict(item.user_properties).get("answer")
        verdict = {"passed": "yes", "failed": "**no**", "skipped": "skipped"}[report.outcome]
        # A case of several runs, chat and completions, counts as its worst: what did not pass stays.
        if RESULTS.get(row.args, "yes").startswith("yes"):
            RESULTS[row.args] = f"{verdict}: {answer}" if answer else verdict
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-table", default=False):
        return
    lines = [
        "# The OpenAI surface, tested",
        "",
        "Written by the suite itself, from a run against a server:",
        "",
        f"    {COMMAND}",
        "",
        f"vLLM {metadata.version('vllm')}, openai {metadata.version('openai')}, Python "
        f"{platform.python_version()}; the demo checkpoint, `--dtype float32` and `{' '.join(FLAGS[-2:])}`.",
        "",
        "| feature | request | passed |",
        "| --- | --- | --- |",
        *(f"| {feature} | {request} | {result} |" for (feature, request), result in RESULTS.items()),
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def base_url(request: pytest.FixtureRequest) -> str:
    """Where the API is, up to and including /v1."""
    given = request.config.getoption("--base-url", default=None) or os.environ.get("KIMI_BASE_URL")
    if given:
        return given.rstrip("/")
    servers = request.getfixturevalue("servers")
    model = request.getfixturevalue("demo_model")
    return f"{servers(model, *FLAGS).url}/v1"


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    key = os.environ.get("OPENAI_API_KEY", "none")
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=patience.SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    """The first model that the server lists."""
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx.Client]:
    """Plain HTTP, for what the openai client would not send. Paths are relative to /v1/."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=f"{base_url}/", headers=headers, timeout=patience.SECONDS) as client:
        yield client


@pytest.fixture
def answer(record_property: Callable[[str, Any], None]) -> Callable[[str], None]:
    """`answer(text)`: what the table shows beside the verdict."""
    return lambda text: record_property("answer", text.replace("|", "\\|"))


@pytest.fixture
def chat(client: openai.OpenAI, model: str) -> Callable:
    """A chat completion, greedy and 24 tokens long unless told otherwise."""
    return lambda **asked: client.chat.completions.create(**{"model": model, "messages": CHAT, **GREEDY, **asked})


@pytest.fixture
def complete(client: openai.OpenAI, model: str) -> Callable:
    """A text completion, greedy and 24 tokens long unless told otherwise."""
    return lambda **asked: client.completions.create(**{"model": model, "prompt": PROMPT, **GREEDY, **asked})


@pytest.fixture(params=["chat", "completions"])
def ask(request: pytest.FixtureRequest) -> Callable:
    """Both endpoints, one after the other."""
    return request.getfixturevalue("chat" if request.param == "chat" else "complete")
