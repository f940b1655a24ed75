"""The file of keys: a new key's entry, and what is said of a file that cannot be used."""

from pathlib import Path

import pytest

from kimi_server.gateway.config.settings import SettingsError
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.keys.keys_file import digest, generate_key

HASH = digest("x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: {}", ["keys", "list"]),
        ("keys: []", ["at least one"]),
        ("keys: [{id: a}]", ["keys[0]", "'sha256'"]),
        (f"keys: [{{id: '', sha256: {HASH}}}]", ["empty id"]),
        ("keys: [{id: a, sha256: sk-secret}]", ["'a'", "64 hexadecimal"]),
        (f"keys: [{{id: a, sha256: {HASH}}}, {{id: a, sha256: {HASH}}}]", ["own"]),
        (f"keys: [{{id: a, sha256: {HASH}, concurrency: 0}}]", ["concurrency", "0", "at least 1"]),
        (f"keys: [{{id: a, sha256: {HASH}, key: sk-secret}}]", ["'key'"]),
        ("keys: &a [*a]", ["alias", "line 1"]),
        (f"keys: [{{id: a, sha256: {HASH}}}]\nkeys: []", ["twice", "line 2"]),
        ("keys: [{1: 2}]", ["name", "no text"]),
        ("keys: [{id: !!bool maybe}]", ["KeyError", "quotes", "line 1"]),
        ("keys: [{id: 12, sha256: x}]", ["keys[0].id", "12", "text"]),
        ("keys: [sk-secret]", ["keys[0]", "mapping"]),
        ("keys: [{id: a, sha256: [sk-secret}]", ["not YAML", "line 1"]),
        ("keys: [{id: a, sha256: sk-secret\n ]", ["not YAML", "line 2"]),
        (f"cache_salt_secret: sk-secret\nkeys: [{{id: a, sha256: {HASH}}}]", ["cache_salt_secret", "16"]),
        (f"keys: [{{id: a, sha256: {HASH}, concurrency: {2**60}}}]", ["keys[0].concurrency", "at most"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        Keyring(path)
    for word in words:
        assert word in str(error.value)
    assert "sk-secret" not in str(error.value)


def test_a_fresh_key(tmp_path: Path) -> None:
    (key, entry), (other, _) = generate_key("team-a"), generate_key("team-a")
    assert key != other and len(key) > 40
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + entry)
    assert key not in entry
    assert Keyring(path).authenticate(key).key.id == "team-a"
