"""The alert rules: one text, metrics that exist, and rules that fire when they should and not before."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kimi_server.gateway import admission
from tests.support.metrics import PARTS, check, gateway_samples, samples, server_names

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "alerts.yml"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)"
)


def promtool(*words: str | Path, cwd: Path = DEPLOY) -> None:
    done = subprocess.run(["promtool", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_metrics_and_labels_exist(name: str) -> None:
    expression = ALERTS[name]["expr"]
    servers = server_names()
    known = gateway_samples() | {
        sample: {"model_name", "engine"} for sample in samples(expression) if PARTS.sub("", sample) in servers
    }
    check(expression, known)


@pytest.mark.parametrize(
    "wrong",
    [
        "kimi_gateway_replica_ups < 1",
        "rate(vllm:num_preemption_total[5m])",
        'kimi_gateway_rejected_total{status="1"}',
        "sum by (key) (kimi_gateway_queued)",
    ],
)
def test_a_metric_or_label_that_is_not_there_is_found(wrong: str) -> None:
    known = gateway_samples() | {name: set[str]() for name in server_names()}
    with pytest.raises(AssertionError):
        check(wrong, known)


def test_reasons_are_those_that_the_gateway_gives() -> None:
    source = Path(admission.__file__).read_text()
    for alert in ALERTS.values():
        for reasons in re.findall(r'reason=~"([^"]*)"', alert["expr"]):
            for reason in reasons.split("|"):
                assert f'GatewayError(503, "{reason}"' in source


@pytest.mark.parametrize("name", ALERTS)
def test_a_person_is_told_what_and_how_bad(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description"} and alert["for"]
    assert f"| `{name}` |" in (ROOT / "docs/guide/operating.md").read_text(), "the guide does not say what to do"


def test_kubernetes_has_the_same_rules() -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/monitoring.yaml").read_text())
    [rule] = [one for one in documents if one["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load(RULES.read_text())


@needs_promtool
def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    promtool("check", "rules", RULES)
    promtool("check", "config", "prometheus.yml")


# Alert -> series that make it fire at 2h of data a minute apart, and series that do not.
UP, REQUESTS, REJECTED = "kimi_gateway_replica_up", "kimi_gateway_requests_total", "kimi_gateway_rejected_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "KimiLinearNoReplica": (
        {f'{UP}{{replica="0"}}': "0x180", f'{UP}{{replica="1"}}': "0x180"},
        {f'{UP}{{replica="0"}}': "0x180", f'{UP}{{replica="1"}}': "1x180"},
    ),
    "KimiLinearNoGateway": ({"other": "1x180"}, {f'{UP}{{replica="0"}}': "0x180"}),
    "KimiLinearReplicaDown": ({f'{UP}{{replica="0"}}': "0x180"}, {f'{UP}{{replica="0"}}': "0x115 1x65"}),
    "KimiLinearErrors": (
        {f'{REQUESTS}{{status="200"}}': "0+90x180", f'{REQUESTS}{{status="502"}}': "0+10x180"},
        {f'{REQUESTS}{{status="200"}}': "0+90x180", f'{REQUESTS}{{status="429"}}': "0+90x180"},
    ),
    "KimiLinearQueueDeadline": (
        {f'{REJECTED}{{reason="deadline"}}': "0+1x180"},
        {f'{REJECTED}{{reason="unknown_key"}}': "0+9x180"},
    ),
    "KimiLinearPrefixesEvicted": (
        {
            'kimi_linear_snapshots_evicted_total{instance="a"}': "0+1x1440",
            f'{HITS}{{instance="a"}}': "0+90x1380 124200+10x120",
            f'{QUERIES}{{instance="a"}}': "0+100x1500",
        },
        {
            'kimi_linear_snapshots_evicted_total{instance="a"}': "0+1x1440",
            f'{HITS}{{instance="a"}}': "0+90x1500",
            f'{QUERIES}{{instance="a"}}': "0+100x1500",
        },
    ),
    "KimiLinearPreemptions": (
        {'vllm:num_preemptions_total{instance="a"}': "0+10x180"},
        {'vllm:num_preemptions_total{instance="a"}': "0+1x180"},
    ),
}


def fires(alert: str, series: dict[str, str], tmp_path: Path) -> bool:
    """Whether it fires at the end of what is given, by promtool's own test of rules."""
    at = "24h" if alert == "KimiLinearPrefixesEvicted" else "2h"
    given = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": given, "alert_rule_test": [{"eval_time": at, "alertname": alert}]}
    test = tmp_path / "test.yml"
    test.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", str(test)], capture_output=True, text=True, timeout=120)
    assert "SUCCESS" in done.stdout or "got:[" in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode != 0  # it was said that nothing would


def test_every_alert_has_series() -> None:
    assert SERIES.keys() == ALERTS.keys()


@needs_promtool
@pytest.mark.parametrize("name", SERIES)
def test_it_fires_when_it_should(name: str, tmp_path: Path) -> None:
    bad, good = SERIES[name]
    assert fires(name, bad, tmp_path)
    assert not fires(name, good, tmp_path)
