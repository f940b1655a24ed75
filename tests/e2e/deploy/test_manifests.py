"""The Kubernetes files of deploy/ against the schemas of what reads them, and against each other."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
CRDS = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
KUBERNETES = "1.34"
NAMED_TWICE = ("gateway.yaml:Service", "monitoring.yaml:ServiceMonitor")  # a file has two of these
SLOWEST_START = 98e9 / 50e6  # seconds: the weights' bytes from a disk of 50 MB/s


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and kind, document) of every Kubernetes manifest."""
    for path in [*sorted((DEPLOY / "kubernetes").glob("*.yaml")), DEPLOY / "ray/rayservice.yaml"]:
        if path.name != "kustomization.yaml":
            for document in yaml.safe_load_all(path.read_text()):
                name = f"{path.name}:{document['kind']}"
                yield (f"{name}:{document['metadata']['name']}" if name in NAMED_TWICE else name), document


def pods(node: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, spec) of every pod below a document."""
    if isinstance(node, dict):
        if "containers" in node:
            yield at, node
        for key, value in node.items():
            yield from pods(value, f"{at}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from pods(value, f"{at}/{index}")


DOCUMENTS = dict(documents())
PODS = {at: spec for name, document in DOCUMENTS.items() for at, spec in pods(document, name)}
SERVING = {at: spec for at, spec in PODS.items() if "StatefulSet" in at or "leaderTemplate" in at}


def check_core(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check(document: dict[str, Any]) -> None:
    """Raise ValidationError where a manifest does not fit its schema."""
    if document["kind"] not in CRDS:
        check_core(document)
        return

    def check_template(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[Exception]:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": instance}
        try:
            check_core(template)
        except kubernetes_validate.ValidationError as error:
            yield jsonschema.ValidationError(f"pod template: {error.message}")

    checker = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"podTemplate": check_template})
    checker(CRDS[document["kind"]]).validate(document["spec"])


def container(spec: dict[str, Any]) -> dict[str, Any]:
    (one,) = spec["containers"]
    return one


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifest_fits_its_schema(name: str) -> None:
    check(DOCUMENTS[name])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_schemas_refuse_a_field_that_nobody_reads(name: str) -> None:
    document = copy.deepcopy(DOCUMENTS[name])
    document.get("spec", document)["replica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("name", ["vllm.yaml:StatefulSet", "leaderworkerset.yaml:LeaderWorkerSet"])
def test_the_schemas_look_into_pods(name: str) -> None:
    document = copy.deepcopy(DOCUMENTS[name])
    for _, spec in pods(document, name):
        container(spec)["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("at", PODS)
def test_pod_is_unprivileged(at: str) -> None:
    spec, own = PODS[at], container(PODS[at])["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001  # of the images
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own.get("readOnlyRootFilesystem") or "RayService" in at
    assert spec["automountServiceAccountToken"] is False
    assert container(spec)["resources"].keys() == {"requests", "limits"}


@pytest.mark.parametrize("at", PODS)
def test_what_a_pod_mounts_exists(at: str) -> None:
    spec = PODS[at]
    named = {volume["name"] for volume in spec["volumes"]}
    mounted = {mount["name"] for mount in container(spec)["volumeMounts"]}
    assert named == mounted
    file = at.split(":")[0]
    made = {(one["kind"], one["metadata"]["name"]) for name, one in DOCUMENTS.items() if name.startswith(f"{file}:")}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in made
        if "persistentVolumeClaim" in volume:
            claim = DOCUMENTS["weights.yaml:PersistentVolumeClaim"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("at", SERVING)
def test_a_server_waits_for_its_model_and_for_its_answers(at: str) -> None:
    spec, own = SERVING[at], container(SERVING[at])
    probes = {name: own[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert all(probe["httpGet"]["path"] == "/health" for probe in probes.values())
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] > SLOWEST_START
    config = yaml.safe_load(DOCUMENTS[at.split(":")[0] + ":ConfigMap"]["data"]["vllm.yaml"])
    assert spec["terminationGracePeriodSeconds"] > config["shutdown-timeout"]
    (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    (mount,) = (mount for mount in own["volumeMounts"] if mount["mountPath"] == "/weights")
    assert mount["readOnly"] is True
    nodes = 2 if at.startswith("leaderworkerset") else 1
    assert int(own["resources"]["limits"]["nvidia.com/gpu"]) * nodes == config["tensor-parallel-size"]


def test_a_group_has_the_nodes_that_its_server_is_spread_over() -> None:
    config = yaml.safe_load(DOCUMENTS["leaderworkerset.yaml:ConfigMap"]["data"]["vllm.yaml"])
    template = DOCUMENTS["leaderworkerset.yaml:LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    assert config["distributed-executor-backend"] == "ray"
    leader, worker = (template[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert leader["resources"] == worker["resources"]


def test_the_gateways_find_their_replicas() -> None:
    deployment = DOCUMENTS["gateway.yaml:Deployment"]["spec"]
    own = container(deployment["template"]["spec"])
    assert own["image"] == "kimi-linear-gateway"
    assert own["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert own["livenessProbe"]["httpGet"]["path"] == "/healthz"
    config = yaml.safe_load(DOCUMENTS["gateway.yaml:ConfigMap"]["data"]["gateway.yaml"])
    pause = own["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > config["drain_seconds"] + pause
    names = {DOCUMENTS[f"{name}"]["metadata"]["name"] for name in ("vllm.yaml:StatefulSet", "vllm.yaml:Service")}
    (name,) = names | {DOCUMENTS["leaderworkerset.yaml:LeaderWorkerSet"]["metadata"]["name"]}
    assert [replica["url"] for replica in config["replicas"]] == [f"http://{name}-0.{name}:8000"]


def test_two_gateways_are_never_both_gone_and_share_a_replicas_budget() -> None:
    deployment = DOCUMENTS["gateway.yaml:Deployment"]["spec"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    budget = DOCUMENTS["gateway.yaml:PodDisruptionBudget"]["spec"]
    assert budget["minAvailable"] == deployment["replicas"] - 1
    assert budget["selector"] == deployment["selector"]
    config = yaml.safe_load(DOCUMENTS["gateway.yaml:ConfigMap"]["data"]["gateway.yaml"])
    whole = yaml.safe_load((DEPLOY / "gateway.yaml").read_text())["admission"]
    for name, tokens in config["admission"].items():
        assert tokens * deployment["replicas"] == whole[name]


def test_the_ingress_speaks_tls_and_keeps_a_key_at_one_gateway() -> None:
    ingress = DOCUMENTS["ingress.yaml:Ingress"]
    assert ingress["metadata"]["annotations"]["haproxy.org/load-balance"] == "hdr(Authorization)"
    [rule], [tls] = ingress["spec"]["rules"], ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]] and tls["secretName"]
    [path] = rule["http"]["paths"]
    service = DOCUMENTS[f"gateway.yaml:Service:{path['backend']['service']['name']}"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize(
    ("monitor", "service"), [("gateway", "gateway.yaml:Service:gateway-metrics"), ("vllm", "vllm.yaml:Service")]
)
def test_the_operator_finds_the_metrics(monitor: str, service: str) -> None:
    spec, found = DOCUMENTS[f"monitoring.yaml:ServiceMonitor:{monitor}"]["spec"], DOCUMENTS[service]
    assert spec["selector"]["matchLabels"].items() <= found["metadata"]["labels"].items()
    [endpoint] = spec["endpoints"]
    assert endpoint["port"] in {port["name"] for port in found["spec"]["ports"]}


def test_prometheus_reaches_the_servers_from_its_own_namespace() -> None:
    [rule] = DOCUMENTS["vllm.yaml:NetworkPolicy"]["spec"]["ingress"]
    prometheus = {"app.kubernetes.io/name": "prometheus"}  # as the operator labels its pods
    assert {"namespaceSelector": {}, "podSelector": {"matchLabels": prometheus}} in rule["from"]


def test_kustomize_names_every_image_and_file() -> None:
    text = (DEPLOY / "kubernetes/kustomization.yaml").read_text()
    kustomization = yaml.safe_load(text)
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    chosen = {"kustomization.yaml", "leaderworkerset.yaml", "monitoring.yaml"}  # not applied by all
    assert set(kustomization["resources"]) == files - chosen
    used = {container(spec)["image"] for at, spec in PODS.items() if at.split(":")[0] in kustomization["resources"]}
    assert used == {image["name"] for image in kustomization["images"]}
    if not shutil.which("kubectl"):
        return
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=True
    )
    made = [one for one in yaml.safe_load_all(done.stdout) if one["kind"] in ("Deployment", "StatefulSet", "Job")]
    assert {container(one["spec"]["template"]["spec"])["image"] for one in made} == {
        f"{image}:latest" for image in used
    }


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_gateway_takes_its_configuration(where: str, tmp_path: Path) -> None:
    settings = pytest.importorskip("kimi_server.gateway.config.settings", reason="the gateway is not in this tree yet")
    text = DOCUMENTS["gateway.yaml:ConfigMap"]["data"]["gateway.yaml"]
    path = tmp_path / "gateway.yaml"
    path.write_text((DEPLOY / "gateway.yaml").read_text() if where == "compose" else text)
    loaded = settings.load(path)
    assert (loaded.host, loaded.port) == ("0.0.0.0", 8080)
    assert (loaded.metrics_host, loaded.metrics_port) == ("0.0.0.0", 9464)
    assert loaded.keys == Path({"compose": "/keys", "kubernetes": "/run/secrets/kimi-linear"}[where]) / "keys.yaml"


def test_the_published_service_does_not_lead_to_the_metrics() -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/gateway.yaml").read_text())
    services = {one["metadata"]["name"]: one["spec"]["ports"] for one in documents if one["kind"] == "Service"}
    targets = {name: [port["targetPort"] for port in ports] for name, ports in services.items()}
    assert targets == {"gateway": ["http"], "gateway-metrics": ["metrics"]}
    (spec,) = (spec for at, spec in PODS.items() if at.startswith("gateway.yaml:Deployment"))
    assert {one["name"]: one["containerPort"] for one in container(spec)["ports"]} == {"http": 8080, "metrics": 9464}
