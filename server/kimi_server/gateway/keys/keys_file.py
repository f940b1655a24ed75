"""The file of API keys: what each key may do, and the hash that it is recognised by."""

import hashlib
import json
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from kimi_server.gateway.config.fields import CONFIG, Fields, Secret, Switch, Text, Whole, build, wrong
from kimi_server.gateway.config.yaml_file import parse

MIN_SECRET = 16  # characters of cache_salt_secret
Limit = Annotated[Whole, Field(ge=1)] | None


@dataclass(frozen=True, config=CONFIG)
class Key(Fields):
    """One entry of the file: what this key may do. A limit of None is no limit."""

    id: Text
    sha256: Text = Field(repr=False)
    owner: Text | None = None  # the keys of one owner share cached prefixes; None: the key is its own owner
    metrics: Switch = False  # may read /metrics, where that is on the port of the API
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None  # prompt and completion
    concurrency: Limit = None  # requests at once
    longest_context: Limit = None  # tokens, as estimated, with the longest answer asked for

    @property
    def cache_owner(self) -> str:
        """Whose cached prefixes it shares: the owner's, or its own."""
        return self.owner or self.id


@dataclass(frozen=True, config=CONFIG)
class KeysFile(Fields):
    keys: tuple[Key, ...]
    cache_salt_secret: Secret | None = None  # what the owners' cache salts are made from

    @model_validator(mode="after")
    def _fit(self) -> "KeysFile":
        for key in self.keys:
            if not key.id:
                raise wrong("a key has an empty id: give it a name")
            if len(key.sha256) != 64 or not set(key.sha256.lower()) <= set("0123456789abcdef"):
                raise wrong(f"sha256 of key {key.id!r} is not 64 hexadecimal digits: see `gateway key`")
        if not self.keys or len({key.id for key in self.keys}) < len(self.keys):
            raise wrong("keys must be at least one, each with an id of its own")
        secret = self.cache_salt_secret
        if secret is not None and len(secret.get_secret_value()) < MIN_SECRET:
            raise wrong(f"cache_salt_secret has fewer than {MIN_SECRET} characters: take random ones")
        return self


def parse_keys(content: bytes, path: Path) -> KeysFile:
    """The file of keys; raises SettingsError, whose message names `path`."""
    return build(KeysFile, parse(content, path), path)


def generate_key(key_id: str, owner: str | None = None) -> tuple[str, str]:
    """(a new key, its entry in the file as YAML). The key itself is stored nowhere."""
    key, sha256 = new_key()
    names = {"id": key_id, "owner": owner} if owner else {"id": key_id}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in names.items()]
    return key, "- " + "\n  ".join([*lines, f"sha256: {sha256}"])


def new_key() -> tuple[str, str]:
    """(a new key, its sha256 as the file has it)."""
    key = "sk-" + secrets.token_urlsafe(32)
    return key, digest(key)


def digest(key: str) -> str:
    """SHA-256 in hexadecimal digits. A fast hash is enough: a key is 256 random bits, not a password to be guessed."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
