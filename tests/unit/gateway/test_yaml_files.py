"""Any content of gateway.yaml and keys.yaml: taken, or answered with one sentence, in little time and memory."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kimi_server.gateway.config import yaml_file
from kimi_server.gateway.config.settings import Settings, SettingsError, load
from kimi_server.gateway.keys import keyring
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.keys.keys_file import digest
from kimi_server.gateway.keys.limits import KeyLimiter
from kimi_server.gateway.metrics import Metrics
from tests.support.upstream import Upstream

HASH = digest("x")


def grown(first: str, form: str) -> str:
    """A file of ten lines, each of which holds the line before ten times."""
    lines = [f"a: &a {first}"]
    for old, new in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{new}: &{new} {form % ', '.join([f'*{old}'] * 10)}")
    return "\n".join(lines)


BOMB = grown("{k: 1, l: 2}", "{<<: [%s]}")
LAUGHS = grown("[x]", "[%s]")
HUGE = 10**400

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        [HUGE, -HUGE, 2**53, "\ud800", "\0", "http://[::1", "http://a:b", "http://x", "0.0.0.0", "", HASH]
    )
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
key_fields = st.sampled_from(["id", "sha256", "owner", "metrics", "requests_per_minute", "longest_context"])
keys_files = st.fixed_dictionaries(
    {"keys": st.lists(st.dictionaries(key_fields, values) | values, max_size=3) | values},
    optional={"cache_salt_secret": values, "keyz": values},
)
replica_fields = st.sampled_from(["url", "data_parallel_rank", "api_key"])
fields = {name: values for name in Settings.__dataclass_fields__}
gateway_files = st.fixed_dictionaries(
    {"replicas": st.lists(st.dictionaries(replica_fields, values) | values, max_size=3) | values},
    optional={name: value for name, value in fields.items() if name != "replicas"},
)
# Pieces of YAML that mean something to its reader, put together in any order.
pieces = st.sampled_from(
    [
        *"[]{}:,-?|>&*!%@`'\"#\n =~\t\0\x85\ufeff",
        *("keys", "id", "- ", ": ", "&a ", "*a", "<<", "!!bool ", "!!int ", "!!timestamp ", "!!set "),
        *("!!python/name:os.system ", "2024-13-45", "2024-01-05", "1:30", "0x", "0o9", "9" * 5000, ".nan", "1e999"),
        *("---\n", "...\n", "\\ud800", "[" * 3000),
    ]
)
texts = st.lists(pieces, max_size=12).map("".join) | st.text()
hostile = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def content_of(value: Any) -> bytes:
    """A file that holds this value, as YAML's JSON part, with numbers of any length."""
    if isinstance(value, dict):
        inner = b",".join(json.dumps(str(name)).encode() + b": " + content_of(one) for name, one in value.items())
        return b"{" + inner + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(content_of, value)) + b"]"
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value).encode()
    if isinstance(value, float):
        return yaml.safe_dump(value).removesuffix("...\n").strip().encode()
    return json.dumps(value).encode()


def check_sentence(error: SettingsError, path: Path) -> None:
    message = str(error)
    assert message.startswith(str(path)), message
    assert message.isprintable() and message.endswith("."), message
    assert len(message) < 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@hostile
@given(st.binary() | texts.map(lambda text: text.encode(errors="surrogatepass")) | gateway_files.map(content_of))
@example(b"\x80")
@example(BOMB.encode())
@example(LAUGHS.encode())
@example(content_of({"replicas": [{"url": "http://x"}], "keys": "a\0b", "host": "a..b"}))
@example(content_of({"replicas": [{"url": "http://x"}], "port": 1 << 20000}))
@example(content_of({"replicas": [{"url": "http://x"}], "drain_seconds": HUGE}))
def test_gateway_yaml(folder: Path, content: bytes) -> None:
    path = folder / "gateway.yaml"
    path.write_bytes(content)
    try:
        found = load(path)
    except SettingsError as error:
        check_sentence(error, path)
        return
    if found.keys is not None:  # the file that it names has any name
        with pytest.raises(SettingsError):
            Keyring(found.keys)


@hostile
@given(st.binary() | texts.map(lambda text: text.encode(errors="surrogatepass")) | keys_files.map(content_of))
@example(b"keys: [{id: 2024-13-45, sha256: " + HASH.encode() + b"}]")
@example(content_of({"keys": [{"id": "\ud800", "sha256": HASH}]}))
@example(content_of({"keys": [{"id": "a", "sha256": HASH, "tokens_per_minute": HUGE}]}))
@example(b"keys: &a [*a]")
@example(b"keys: [{? [a]: b}]")
@example(b"keys: [{? {a: b} : b}]")
@example(b"keys: [{id: !!bool maybe}]")
@example(b"keys: [{id: !!int ''}]")
@example(b"keys: [{id: !!timestamp x}]")
@example(b"keys: " + b"9" * 5000)
@example(b"keys: " + b"[" * 20000)
@example(b"keys: " + b"{a: " * 20000)
@example(BOMB.encode())
@example(LAUGHS.encode())
def test_keys_yaml(folder: Path, content: bytes) -> None:
    path = folder / "keys.yaml"
    good = {"keys": [{"id": "alice", "sha256": digest("sk-alice")}]}
    path.write_text(json.dumps(good))
    ring = Keyring(path)
    path.write_bytes(content)
    ring.reload()
    try:
        found = Keyring(path)
    except SettingsError as error:
        check_sentence(error, path)
        assert ring.authenticate("sk-alice").key.id == "alice"
    else:
        assert ring.limiters.keys() == found.limiters.keys()
        for limiter in ring.limiters.values():
            use(limiter)
    # The watcher lives: the next good file counts.
    path.write_text(json.dumps({"keys": [{"id": "bob", "sha256": digest("sk-bob")}]}))
    ring.reload()
    assert list(ring.limiters) == ["bob"]


def use(limiter: KeyLimiter) -> None:
    """What a key that was taken must be fit for."""
    with limiter.request():
        limiter.charge(0).settle(10)
        limiter.tokens.wait(limiter.key.tokens_per_minute or 1)
    metrics = Metrics()
    metrics.prompt_tokens.labels(limiter.key.id).inc(1)
    assert metrics.text()


def test_a_date_without_quotes_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{id: 2024-13-45, sha256: {digest('sk-x')}}}]")
    assert Keyring(path).authenticate("sk-x").key.id == "2024-13-45"


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("# " + "x" * yaml_file.MOST_BYTES)
    with pytest.raises(SettingsError, match="larger than"):
        Keyring(path)


def test_a_key_revoked_after_a_bad_file_is_refused(
    start, keys_file, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "RELOAD_SECONDS", 0.05)
    path = keys_file(alice={}, bob={})
    gateway = start(Upstream(), keys=path)
    with gateway.client(headers={"authorization": "Bearer sk-alice"}) as client:
        with caplog.at_level(logging.ERROR, "kimi_server"):
            path.write_text("keys: [{id: !!timestamp x}]")
            gateway.until(lambda: bool(caplog.records), "the bad file is said")
        assert client.get("/v1/models").status_code == 200
        keys_file(bob={})
        gateway.until(lambda: client.get("/v1/models").status_code == 401, "alice is out")


def test_a_change_that_keeps_size_and_time_is_seen(keys_file) -> None:
    path = keys_file(alice={}, carol={})
    ring = Keyring(path)
    times = path.stat()
    text = path.read_text()
    path.write_text(text.replace(digest("sk-alice"), digest("sk-other")))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    ring.reload()
    assert ring.authenticate("sk-other").key.id == "alice"
