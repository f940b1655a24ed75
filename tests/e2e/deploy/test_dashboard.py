"""Every metric of the dashboard is one that vLLM or the gateway exports, with the labels it is grouped by."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support.completions import Completions
from tests.support.metrics import GATEWAY, PARTS, PREFIX, check, gateway_samples, samples, server_names

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/kimi-linear.json").read_text())
PANELS = {panel["id"]: panel for panel in BOARD["panels"]}
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
PLUGIN = {"kimi_linear_snapshots_held", "kimi_linear_snapshots_evicted_total"}


def expressions() -> Iterator[str]:
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def of_servers() -> list[str]:
    """What asks for metrics of vLLM or the plugin."""
    return [expression for expression in expressions() if PREFIX not in expression]


def test_panels_of_the_gateway() -> None:
    shown = [expression for expression in expressions() if PREFIX in expression]
    for expression in shown:
        check(expression, gateway_samples())
    stems = {re.sub("_bucket$", "", name.removeprefix(PREFIX)) for one in shown for name in samples(one)}
    assert stems == GATEWAY.keys(), "a metric of the gateway is not shown"


def test_panels_of_servers_ask_for_what_the_sources_have() -> None:
    names = server_names()
    asked = set().union(*map(samples, of_servers()))
    assert {PARTS.sub("", name) for name in asked} <= names
    assert asked >= PLUGIN, "a metric of the plugin is not shown"


@pytest.mark.parametrize("panel", PANELS.values(), ids=lambda panel: panel["title"])
def test_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    if panel["type"] == "row":
        return
    assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        variable = "$gateway" if PREFIX in target["expr"] else "$server"
        metrics = re.findall(r"(?:vllm:|kimi_)\w+(\{[^}]*\})?", target["expr"])
        assert metrics and all(f'instance=~"{variable}"' in matchers for matchers in metrics), target["expr"]


def test_variables_choose_by_metrics_that_exist() -> None:
    assert VARIABLES.keys() == {"datasource", "gateway", "server"}
    for name, known in (("gateway", gateway_samples().keys()), ("server", server_names())):
        found = re.fullmatch(r"label_values\(([\w:]+), instance\)", VARIABLES[name]["query"]["query"])
        assert found and found[1] in known


def test_panels_lie_beside_each_other() -> None:
    assert len(PANELS) == len(BOARD["panels"]) and any(panel["type"] == "stat" for panel in PANELS.values())
    taken: set[tuple[int, int]] = set()
    for panel in PANELS.values():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    plain = [expression.replace("$__rate_interval", "1m") for expression in expressions()]
    rules = [{"record": f"panel:{index}", "expr": expression} for index, expression in enumerate(plain)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_of_vllm(servers: Callable[..., Server], demo_model: Path) -> None:
    server = Completions(servers(demo_model, *FLAGS))
    known: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    for expression in of_servers():
        check(expression, known)
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            if PREFIX not in rule["expr"]:
                check(rule["expr"], known)


def test_the_gateway_exports_what_is_shown() -> None:
    metrics = pytest.importorskip("kimi_server.gateway.metrics", reason="the gateway is not in this tree yet")
    text = metrics.Metrics().text().decode()
    exported = dict(re.findall(rf"^# TYPE {PREFIX}(\w+) (\w+)$", text, re.MULTILINE))
    # A client library may add the time at which a series was made.
    assert {name: kind for name, kind in exported.items() if not name.endswith("_created")} == {
        name: kind for name, (kind, _) in GATEWAY.items()
    }
