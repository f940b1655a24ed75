"""The Kubernetes and compose files of deploy/ against the schemas of what reads them, and against each other."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
CRDS = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
KUBERNETES = "1.34"
SLOWEST_START = 98e9 / 50e6  # seconds: the weights' bytes from a disk of 50 MB/s


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and kind, document) of every Kubernetes manifest."""
    for path in [*sorted((DEPLOY / "kubernetes").glob("*.yaml")), DEPLOY / "ray/rayservice.yaml"]:
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{document['kind']}", document


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
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]


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


def seconds(text: str) -> float:
    """Of a compose duration such as `1m30s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifest_fits_its_schema(name: str) -> None:
    check(DOCUMENTS[name])


@pytest.mark.parametrize("name", ["vllm.yaml:StatefulSet", "leaderworkerset.yaml:LeaderWorkerSet"])
def test_the_schemas_refuse_a_field_that_nobody_reads(name: str) -> None:
    document = copy.deepcopy(DOCUMENTS[name])
    document["spec"]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check(document)
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
    gpus = config["tensor-parallel-size"]
    assert own["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)


def test_a_group_has_the_nodes_that_its_server_is_spread_over() -> None:
    config = yaml.safe_load(DOCUMENTS["leaderworkerset.yaml:ConfigMap"]["data"]["vllm.yaml"])
    template = DOCUMENTS["leaderworkerset.yaml:LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["size"] == config["pipeline-parallel-size"]
    assert config["distributed-executor-backend"] == "ray"
    leader, worker = (template[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert leader["resources"] == worker["resources"]


def test_the_gateway_is_one_process_and_finds_its_replicas() -> None:
    deployment = DOCUMENTS["gateway.yaml:Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    own = container(deployment["template"]["spec"])
    assert own["command"] == ["kimi-linear", "gateway"]
    assert own["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert own["livenessProbe"]["httpGet"]["path"] == "/healthz"
    config = yaml.safe_load(DOCUMENTS["gateway.yaml:ConfigMap"]["data"]["gateway.yaml"])
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > config["drain_seconds"]
    names = {DOCUMENTS[f"{name}"]["metadata"]["name"] for name in ("vllm.yaml:StatefulSet", "vllm.yaml:Service")}
    (name,) = names | {DOCUMENTS["leaderworkerset.yaml:LeaderWorkerSet"]["metadata"]["name"]}
    assert [replica["url"] for replica in config["replicas"]] == [f"http://{name}-0.{name}:8000"]


def test_compose_fits_its_schema() -> None:
    plain = re.sub(r"\$\{\w+:-(\w*)\}", r"\1", COMPOSE.replace("<<: *ours", ""))  # it interpolates nothing
    assert set(PyCompose.from_yaml(plain).service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="healthchek"):
        PyCompose.from_yaml("services: {vllm: {image: kimi-linear, healthchek: {}}}")


def test_compose_files_and_names_exist() -> None:
    compose = yaml.safe_load(COMPOSE)
    for one in compose["configs"].values():
        assert (DEPLOY / one["file"]).is_file()
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= compose["networks"].keys()
        assert set(service.get("depends_on", [])) <= SERVICES.keys()
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        assert {config["source"] for config in service.get("configs", [])} <= compose["configs"].keys()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_dir(), name


def test_compose_waits_and_drains() -> None:
    vllm, gateway = SERVICES["vllm"], SERVICES["gateway"]
    assert gateway["depends_on"]["vllm"]["condition"] == "service_healthy"
    assert seconds(vllm["healthcheck"]["start_period"]) > SLOWEST_START
    flags = yaml.safe_load((DEPLOY / "vllm.yaml").read_text())
    assert seconds(vllm["stop_grace_period"]) > flags["shutdown-timeout"]
    config = yaml.safe_load((DEPLOY / "gateway.yaml").read_text())
    assert seconds(gateway["stop_grace_period"]) > config["drain_seconds"]
    assert config["replicas"] == [{"url": "http://vllm:8000"}]


def test_compose_keeps_the_keys_where_one_service_writes_and_the_gateway_reads() -> None:
    """In a volume of its own: a file that is mounted alone would not be seen to be replaced."""
    config, keys = yaml.safe_load((DEPLOY / "gateway.yaml").read_text()), SERVICES["keys"]
    assert config["keys"] == "/keys/keys.yaml" and keys["working_dir"] == "/keys"
    assert "keys:/keys:ro" in SERVICES["gateway"]["volumes"] and keys["volumes"] == ["keys:/keys"]
    assert "VOLUME /keys" in (DEPLOY / "Dockerfile.gateway").read_text()
    assert keys["image"] == SERVICES["gateway"]["image"]


def test_compose_takes_registry_and_tag_from_the_environment() -> None:
    ours = {name: one["image"] for name, one in SERVICES.items() if "kimi-linear" in one["image"]}
    assert ours.keys() == {"vllm", "gateway", "keys", "pull"}
    for image in ours.values():
        assert re.fullmatch(r"\$\{REGISTRY:-\}kimi-linear(-gateway)?:\$\{TAG:-latest\}", image)
    for name in ("vllm", "gateway"):
        build = SERVICES[name]["build"]
        dockerfile = DEPLOY.parent / build.get("dockerfile", "Dockerfile")
        assert dockerfile.is_file() and (DEPLOY / build["context"]).resolve() == DEPLOY.parent


def test_compose_serves_offline() -> None:
    """vLLM and Prometheus are on a network with no way out; only the pull may write the weights."""
    assert yaml.safe_load(COMPOSE)["networks"]["inside"] == {"internal": True}
    assert SERVICES["vllm"]["networks"] == SERVICES["prometheus"]["networks"] == ["inside"]
    mounts = {name: [volume for volume in one["volumes"] if "/weights" in volume] for name, one in SERVICES.items()}
    assert {name for name, found in mounts.items() if "weights:/weights" in found} == {"pull"}
    assert SERVICES["pull"]["environment"]["HF_HUB_OFFLINE"] == "0"
    assert "ports" not in SERVICES["vllm"]


def test_prometheus_asks_the_services_of_compose() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    targets = [target for job in config["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    assert targets == ["vllm:8000", "gateway:9464"]
    assert SERVICES["gateway"]["expose"] == ["9464"]
    assert SERVICES["gateway"]["ports"] == ["127.0.0.1:8080:8080"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (board,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/kimi-linear.yaml").read_text())["providers"]
    folder = board["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]


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
