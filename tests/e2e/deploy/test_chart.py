"""The Helm chart: what it makes fits the schemas, and says what the manifests of deploy/kubernetes say."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kimi_server.gateway.config import settings
from tests.e2e.deploy import test_manifests as manifests
from tests.support.helm import NEEDS_HELM, HelmError, render
from vllm_kimi_linear import __version__

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
CHART = DEPLOY / "helm/kimi-linear"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
ALL = {"ingress": {"enabled": True}, "monitoring": {"enabled": True, "labels": {"release": "prometheus"}}}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("gatway", {}),
    ("image", {"tga": "1"}),
    ("image", {"registry": "registry.example.org/"}),
    ("vllm", {"gpus": "4"}),
    ("vllm", {"config": {"model": "m", "shutdown-timeout": 1, "tensor-parallel-size": 2}}),
    ("vllm", {"config": {"model": "m", "shutdown-timeout": 1, "kv-transfer-config": {}}}),
    ("vllm", {"handover": {"gib": 1.5}}),
    ("gateway", {"config": {"drain_seconds": 1, "port": 1}}),
    ("gateway", {"replicas": 0}),
]
Documents = dict[tuple[str, str], dict[str, Any]]


def made(values: dict[str, Any] | None = None, name: str = "k") -> Documents:
    """(kind, name) -> document."""
    return {(one["kind"], one["metadata"]["name"]): one for one in render(CHART, name, values or {})}


def leaves(node: Any, at: str = "") -> set[str]:
    """The paths of all values, such as gateway.replicas; what is handed on whole is not looked into."""
    if not isinstance(node, dict) or at in HANDED_ON or not node:
        return {at}
    return {path for key, value in node.items() for path in leaves(value, f"{at}.{key}" if at else key)}


HANDED_ON = {"vllm.config", "gateway.config", "gateway.admission", "ingress.annotations", "gateway.resources"}


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_values_fit_their_schema_and_a_typo_does_not() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)
    for part, wrong in WRONG:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**VALUES, part: {**VALUES.get(part, {}), **wrong}}, SCHEMA)


def test_every_value_is_used_and_every_use_has_a_value() -> None:
    text = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.([\w.]+)", text))
    known = leaves(VALUES)
    assert all(any(f"{leaf}.".startswith(f"{one}.") for one in used) for leaf in known), known - used
    for one in used:
        assert any(f"{leaf}.".startswith(f"{one}.") or f"{one}.".startswith(f"{leaf}.") for leaf in known), one


def test_the_chart_has_the_rules_of_the_one_file() -> None:
    assert (CHART / "alerts.yml").resolve() == DEPLOY / "alerts.yml"


@NEEDS_HELM
@pytest.mark.parametrize(
    "values",
    [{}, ALL, {"gateway": {"replicas": 1, "tlsSecret": "tls"}, "vllm": {"replicas": 3}}, {"vllm": {"prefill": 2}}],
)
def test_what_is_made_fits_its_schemas(values: dict[str, Any]) -> None:
    documents = made(values)
    for document in documents.values():
        manifests.check(document)
    names = [f"{one['kind']}:{at}" for (_, at), one in documents.items()]
    assert len(names) == len(set(names))
    for document in documents.values():
        for at, spec in manifests.pods(document, document["kind"]):
            assert spec["securityContext"]["runAsUser"] == 10001, at
            assert manifests.container(spec)["securityContext"]["readOnlyRootFilesystem"] is True
            mounted = {mount["name"] for mount in manifests.container(spec)["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}


def config_of(documents: Documents, part: str, name: str = "k") -> dict[str, Any]:
    return yaml.safe_load(documents["ConfigMap", f"{name}-{part}"]["data"][f"{part}.yaml"])


@NEEDS_HELM
def test_servers_are_started_as_by_the_manifests() -> None:
    documents = made()
    assert config_of(documents, "vllm") == yaml.safe_load((DEPLOY / "vllm.yaml").read_text())
    ours = documents["StatefulSet", "k-vllm"]["spec"]["template"]["spec"]
    plain = manifests.DOCUMENTS["vllm.yaml:StatefulSet"]["spec"]["template"]["spec"]
    own, other = manifests.container(ours), manifests.container(plain)
    for field in ("args", "ports", "resources", "startupProbe", "readinessProbe", "livenessProbe", "securityContext"):
        assert own[field] == other[field], field
    assert ours["terminationGracePeriodSeconds"] == plain["terminationGracePeriodSeconds"]


@NEEDS_HELM
def test_gateways_are_started_as_by_the_manifests(tmp_path: Path) -> None:
    documents = made()
    ours = config_of(documents, "gateway")
    plain = yaml.safe_load(manifests.DOCUMENTS["gateway.yaml:ConfigMap"]["data"]["gateway.yaml"])
    assert ours.pop("replicas") == [{"url": "http://k-vllm-0.k-vllm:8000"}]
    del plain["replicas"]
    assert ours == plain
    deployment, other = (
        documents["Deployment", "k-gateway"]["spec"],
        manifests.DOCUMENTS["gateway.yaml:Deployment"]["spec"],
    )
    assert (deployment["replicas"], deployment["strategy"]) == (other["replicas"], other["strategy"])
    assert documents["PodDisruptionBudget", "k-gateway"]["spec"]["minAvailable"] == 1


@NEEDS_HELM
@pytest.mark.parametrize("tls", ["", "a-secret"])
@pytest.mark.parametrize(("gateways", "servers"), [(1, 1), (4, 3)])
def test_the_gateway_takes_its_configuration(tmp_path: Path, tls: str, gateways: int, servers: int) -> None:
    documents = made({"gateway": {"replicas": gateways, "tlsSecret": tls}, "vllm": {"replicas": servers}})
    path = tmp_path / "gateway.yaml"
    path.write_text(documents["ConfigMap", "k-gateway"]["data"]["gateway.yaml"])
    loaded = settings.load(path)
    assert len(loaded.replicas) == servers
    assert loaded.admission.prefill_tokens * gateways == VALUES["gateway"]["admission"]["prefill_tokens"]
    assert (loaded.ssl_certfile is not None) == bool(tls)
    pod = documents["Deployment", "k-gateway"]["spec"]["template"]["spec"]
    assert manifests.container(pod)["readinessProbe"]["httpGet"]["scheme"] == ("HTTPS" if tls else "HTTP")
    assert [one["secret"]["secretName"] for one in pod["volumes"] if one["name"] == "tls"] == ([tls] if tls else [])
    assert ("PodDisruptionBudget", "k-gateway") in documents or gateways == 1


@NEEDS_HELM
def test_prompts_read_by_servers_of_their_own(tmp_path: Path) -> None:
    documents = made({"vllm": {"replicas": 2, "prefill": 1, "handover": {"gib": 20}}})
    config = config_of(documents, "vllm")
    settings_of = config.pop("kv-transfer-config")["kv_connector_extra_config"]
    assert config == config_of(made(), "vllm")
    assert settings_of["cpu_bytes_to_use"] == 20 << 30
    (tier,) = settings_of["secondary_tiers"]
    path = tmp_path / "gateway.yaml"
    path.write_text(documents["ConfigMap", "k-gateway"]["data"]["gateway.yaml"])
    loaded = settings.load(path)
    assert [one.url for one in loaded.replicas] == [f"http://k-vllm-{index}.k-vllm:8000" for index in range(2)]
    assert [one.place for one in loaded.prefill] == [("k-vllm-2.k-vllm", tier["port"])]
    spec = documents["StatefulSet", "k-vllm"]["spec"]
    assert spec["replicas"] == 3
    pod = spec["template"]["spec"]
    assert manifests.container(pod)["env"][-1]["valueFrom"]["fieldRef"] == {"fieldPath": "status.podIP"}
    (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["sizeLimit"] == "28Gi"
    # Each may reach the others, and nobody else.
    policy = documents["NetworkPolicy", "k-vllm"]["spec"]
    assert policy["egress"] == [{"to": [{"podSelector": policy["podSelector"]}]}]
    assert policy["ingress"][-1] == {"from": [{"podSelector": policy["podSelector"]}]}


@NEEDS_HELM
def test_registry_and_tag() -> None:
    def images(values: dict[str, Any]) -> set[str]:
        return {
            manifests.container(spec)["image"]
            for document in made(values).values()
            for _, spec in manifests.pods(document, "")
        }

    assert images({}) == {f"kimi-linear:{__version__}", f"kimi-linear-gateway:{__version__}"}
    given = {"image": {"registry": "registry.example.org/team", "tag": "t1"}}
    assert images(given) == {f"registry.example.org/team/kimi-linear{part}:t1" for part in ("", "-gateway")}


@NEEDS_HELM
def test_a_release_selects_its_own_pods_and_is_watched() -> None:
    documents = made(ALL)
    selectors = [one["spec"]["selector"] for (kind, _), one in documents.items() if kind == "ServiceMonitor"]
    services = [one["metadata"]["labels"] for (kind, _), one in documents.items() if kind == "Service"]
    for selector in selectors:
        assert selector["matchLabels"]["app.kubernetes.io/instance"] == "k"
        assert any(selector["matchLabels"].items() <= labels.items() for labels in services)
    rule = documents["PrometheusRule", "k"]
    assert rule["spec"] == yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    assert documents["Ingress", "k-gateway"]["spec"]["tls"][0]["secretName"] == "gateway-tls"


@NEEDS_HELM
@pytest.mark.parametrize(("part", "wrong"), WRONG)
def test_helm_refuses_what_the_schema_does(part: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(HelmError):
        made({part: wrong})
