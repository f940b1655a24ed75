"""The compose file of deploy/ against its schema, and against the files that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
SLOWEST_START = 98e9 / 50e6  # seconds: the weights' bytes from a disk of 50 MB/s


def seconds(text: str) -> float:
    """Of a compose duration such as `1m30s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


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
