"""Every metric of the dashboard is one that vLLM or the gateway exports, with the labels it is grouped by."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support.completions import Completions
from tests.support.metrics import GATEWAY, PREFIX, check, gateway_samples, samples

BOARD = Path(__file__).resolve().parents[3] / "deploy/grafana/dashboards/kimi-linear.json"


def expressions() -> Iterator[str]:
    for panel in json.loads(BOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def test_panels_of_the_gateway() -> None:
    shown = [expression for expression in expressions() if PREFIX in expression]
    for expression in shown:
        check(expression, gateway_samples())
    stems = {re.sub("_bucket$", "", name.removeprefix(PREFIX)) for one in shown for name in samples(one)}
    assert stems == GATEWAY.keys(), "a metric of the gateway is not shown"


def test_panels_of_vllm(servers: Callable[..., Server], demo_model: Path) -> None:
    server = Completions(servers(demo_model, *FLAGS))
    known: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    shown = [expression for expression in expressions() if "vllm:" in expression]
    assert shown
    for expression in shown:
        check(expression, known)


def test_the_gateway_exports_what_is_shown() -> None:
    metrics = pytest.importorskip("kimi_server.gateway.metrics", reason="the gateway is not in this tree yet")
    text = metrics.Metrics().text().decode()
    exported = dict(re.findall(rf"^# TYPE {PREFIX}(\w+) (\w+)$", text, re.MULTILINE))
    # A client library may add the time at which a series was made.
    assert {name: kind for name, kind in exported.items() if not name.endswith("_created")} == {
        name: kind for name, (kind, _) in GATEWAY.items()
    }
