"""gateway.yaml: what is right is taken, what is wrong gets one sentence."""

from pathlib import Path

import pytest

from kimi_server.gateway.config.settings import ReplicaSettings, SettingsError, load

GOOD = """
replicas:
  - url: http://127.0.0.1:8000
    data_parallel_rank: 1
keys: keys.yaml
admission: {short_prompt: 100, deadline_seconds: 5}
"""
REPLICAS = "replicas: [{url: 'http://127.0.0.1:8000'}]\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "gateway.yaml"
        path.write_text(text)
        return path

    return write


def test_good(write, tmp_path: Path) -> None:
    settings = load(write(GOOD), port=9, host=None)
    assert settings.replicas == (ReplicaSettings("http://127.0.0.1:8000", 1),)
    assert settings.keys == tmp_path / "keys.yaml"
    assert settings.admission.short_prompt == 100
    assert settings.admission.prefill_tokens == 131072
    assert (settings.host, settings.port) == ("127.0.0.1", 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["mapping", "list"]),
        ("a: b: c", ["not YAML"]),
        ("\x80", ["not YAML"]),
        ("port: 80", ["'replicas'", "missing"]),
        ("replicas: []", ["replicas", "empty"]),
        ("replicas: 3", ["replicas", "3", "list"]),
        ("replicas: [3]", ["replicas[0]", "3", "mapping"]),
        ("replicas: [{}]", ["replicas[0]", "'url'", "missing"]),
        ("replicas: [{url: 'ftp://x'}]", ["ftp://x", "http://"]),
        ("replicas: [{url: 'http://x'}, {url: 'http://x'}]", ["twice"]),
        ("replicas: [{url: 'http://x', data_parallel_rank: -1}]", ["data_parallel_rank", "-1", "at least 0"]),
        (REPLICAS + "prot: 80", ["'prot'", "port"]),
        (REPLICAS + "port: eighty", ["port", "eighty", "whole number"]),
        (REPLICAS + "port: true", ["port", "True", "whole number"]),
        (REPLICAS + "port: 70000", ["port", "70000", "65535"]),
        (REPLICAS + "drain_seconds: .nan", ["drain_seconds", "nan", "number"]),
        (REPLICAS + "limits: {body_bytes: 0}", ["limits.body_bytes", "0", "at least 1"]),
        (REPLICAS + "limits: {body: 1}", ["limits", "'body'", "body_bytes"]),
        (REPLICAS + "admission: {queue: -1}", ["queue", "-1", "at least 0"]),
        (REPLICAS + "admission: {short_reserve: 200000}", ["short_reserve", "200000", "prefill_tokens"]),
        (REPLICAS + "admission: {short_prompt: 20000}", ["short_prompt", "20000", "short_reserve"]),
        (REPLICAS + "prefill: [{url: 'http://a'}]", ["prefill[0]", "p2p", "missing"]),
        (REPLICAS + "prefill: [{url: 'http://a', p2p: a}]", ["prefill[0].p2p", "'a'", "a host and a port"]),
        (REPLICAS + "prefill: [{url: 'http://a', p2p: 'a:0'}]", ["prefill[0].p2p", "'a:0'", "a host and a port"]),
        (
            REPLICAS + "prefill: [{url: 'http://a', p2p: 'a:1'}, {url: 'http://a', p2p: 'a:2'}]",
            ["prefill", "one server twice"],
        ),
        (REPLICAS + "host: 0.0.0.0", ["0.0.0.0", "keys", "127.0.0.1"]),
        (REPLICAS + "host: example.org", ["example.org", "keys"]),
    ],
)
def test_bad(write, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        load(write(text))
    message = str(error.value)
    assert "gateway.yaml" in message
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_keys(write, host: str) -> None:
    assert load(write(REPLICAS), host=host).host == host
