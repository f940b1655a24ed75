"""compose.prefill.yaml beside compose.yaml: what it puts over it, and that the parts know each other."""

import ipaddress
import json
from pathlib import Path
from typing import Any

import yaml
from compose_spec import PyCompose

from kimi_server.gateway.config import settings

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


class Loader(yaml.SafeLoader):
    """Of YAML with compose's own tag for what is not merged."""


def untagged(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


Loader.add_constructor("!override", untagged)
OVER: dict[str, Any] = yaml.load((DEPLOY / "compose.prefill.yaml").read_text(), Loader)
UNDER: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVERS = {name: OVER["services"][name] for name in ("vllm", "prefill")}


def connector(server: dict[str, Any]) -> dict[str, Any]:
    [flag] = [flag for flag in server["command"] if flag.startswith("--kv-transfer-config=")]
    found: dict[str, Any] = json.loads(flag.partition("=")[2])
    return found


def test_it_fits_its_schema() -> None:
    services = {**UNDER["services"], **{name: {**UNDER["services"]["vllm"], **one} for name, one in SERVERS.items()}}
    for name in SERVERS:
        services[name].pop("extends", None)
        services[name]["image"] = "kimi-linear-nixl"
        services[name]["build"] = {"context": "."}
    for one in services.values():
        one["image"] = "image"
    merged = {**UNDER, "services": services, "networks": {**UNDER["networks"], **OVER["networks"]}}
    assert {"prefill", "vllm"} <= set(PyCompose.from_yaml(yaml.safe_dump(merged)).service_names())


def test_each_server_has_gpus_and_an_address_of_its_own() -> None:
    [subnet] = OVER["networks"]["inside"]["ipam"]["config"]
    gpus: list[str] = []
    for server in SERVERS.values():
        [device] = server["deploy"]["resources"]["reservations"]["devices"]
        gpus += device["device_ids"]
        assert f"--tensor-parallel-size={len(device['device_ids'])}" in server["command"]
        address = server["networks"]["inside"]["ipv4_address"]
        assert server["environment"] == {"VLLM_P2P_SIDE_CHANNEL_HOST": address}
        assert ipaddress.ip_address(address) in ipaddress.ip_network(subnet["subnet"])
        held = connector(server)["kv_connector_extra_config"]["cpu_bytes_to_use"]
        assert int(server["shm_size"].removesuffix("gb")) << 30 >= held + (8 << 30)
    assert len(set(gpus)) == 4
    assert len({json.dumps(connector(server), sort_keys=True) for server in SERVERS.values()}) == 1


def test_the_gateway_sends_long_prompts_to_the_one_and_all_to_the_other(tmp_path: Path) -> None:
    plain, over = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("gateway.yaml", "gateway.prefill.yaml"))
    [reader] = over.pop("prefill")
    assert over == plain and reader["url"] == "http://prefill:8000"
    [tier] = connector(SERVERS["prefill"])["kv_connector_extra_config"]["secondary_tiers"]
    assert reader["p2p"] == f"prefill:{tier['port']}"
    assert OVER["configs"]["gateway"]["file"] == "gateway.prefill.yaml"
    path = tmp_path / "gateway.yaml"
    path.write_text((DEPLOY / "gateway.prefill.yaml").read_text())
    loaded = settings.load(path)
    assert [one.place for one in loaded.prefill] == [("prefill", tier["port"])]


def test_the_image_is_the_others_with_what_hands_over() -> None:
    for server in SERVERS.values():
        lines = server["build"]["dockerfile_inline"].splitlines()
        assert lines[0] == f"FROM {UNDER['services']['vllm']['image']}"
        assert lines[-1] == "USER 10001"
        assert "nixl" in server["image"]
