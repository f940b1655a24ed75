"""API keys: who may ask, how often, how much. The file holds hashes only, and is read again when it changes."""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from kimi_server.gateway.config.fields import CONFIG, Fields, Secret, Switch, Text, Whole, build, wrong
from kimi_server.gateway.config.yaml_file import SettingsError, parse, read_bytes
from kimi_server.gateway.errors import Refusal
from kimi_server.gateway.keys.limits import Account

RELOAD_SECONDS = 1.0
LEAST_SECRET = 16
Limit = Annotated[Whole, Field(ge=1)] | None

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=CONFIG)
class Key(Fields):
    """One entry of the file. A limit that is not given does not exist."""

    id: Text
    sha256: Text = Field(repr=False)
    owner: Text | None = None  # the keys of one owner share cached prefixes; None: the key is its own owner
    metrics: Switch = False  # may read /metrics, where that is on the port of the API
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None  # prompt and completion
    concurrency: Limit = None
    longest_context: Limit = None  # tokens, as estimated, with the longest answer asked for

    @property
    def belongs_to(self) -> str:
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
        if secret is not None and len(secret.get_secret_value()) < LEAST_SECRET:
            raise wrong(f"cache_salt_secret has fewer than {LEAST_SECRET} characters: take random ones")
        return self


def fresh_key(key_id: str, owner: str | None = None) -> tuple[str, str]:
    """(a new key, its entry in the file); the key itself is stored nowhere."""
    key = "sk-" + secrets.token_urlsafe(32)
    named = {"id": key_id, "owner": owner} if owner else {"id": key_id}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in named.items()]
    return key, "- " + "\n  ".join([*lines, f"sha256: {digest(key)}"])


def digest(key: str) -> str:
    # A fast hash is enough: a key is 256 random bits, not a password that could be guessed.
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def parse_keys(content: bytes, path: Path) -> KeysFile:
    """The file of keys; raises SettingsError."""
    return build(KeysFile, parse(content, path), path)


class Keyring:
    """The accounts by key id; `path` None lets everybody in under one account without limits.

    Raises SettingsError where the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.nobody = Account(Key("", ""))
        self.accounts: dict[str, Account] = {}
        self.owners = 0
        self.secret = secrets.token_bytes(32)  # of the cache salts; the file's, where it gives one
        self.seen: bytes | str = b""  # the file's bytes, or why there were none
        if path is not None:
            self.seen = read_bytes(path)
            self._take(parse_keys(self.seen, path))

    def find(self, presented: str | None) -> Account:
        """The account of a key as the client sent it. Raises Refusal. Takes as long for any key."""
        if self.path is None:
            return self.nobody
        if presented is None:
            raise Refusal(401, "no_key", "An API key is needed: send it as `Authorization: Bearer KEY`.")
        asked, found = digest(presented), None
        for account in self.accounts.values():
            if hmac.compare_digest(asked, account.key.sha256.lower()):
                found = account
        if found is None:
            raise Refusal(401, "unknown_key", "This API key is not known here.")
        return found

    def check_metrics(self, presented: str | None) -> None:
        """Raise Refusal for a key that may not read the metrics, which tell of all keys."""
        key = self.find(presented).key
        if self.path is not None and not key.metrics:
            raise Refusal(403, "metrics", f"Key {key.id!r} may not read the metrics: its entry needs `metrics: true`.")

    def reload(self) -> None:
        """Read the file again. One that cannot be used leaves the keys as they were."""
        self._take_if(self._changed())

    async def watch(self) -> None:
        """Wait, and read the file again; not in the event loop, which a large file would hold up."""
        await asyncio.sleep(RELOAD_SECONDS)
        self._take_if(await asyncio.to_thread(self._changed))

    def _changed(self) -> KeysFile | None:
        """What the file holds, if that is new. Its bytes are compared: its time may stay the same in a change."""
        if self.path is None:
            return None
        try:
            found: bytes | str = read_bytes(self.path)
        except SettingsError as error:
            found = str(error)
        if found == self.seen:
            return None
        self.seen = found
        try:
            if isinstance(found, str):
                raise SettingsError(found)
            return parse_keys(found, self.path)
        except SettingsError as error:
            log.error("the keys stay as they were: %s", error)
            return None

    def _take_if(self, found: KeysFile | None) -> None:
        if found is not None:
            self._take(found)
            log.warning("read %d keys from %s", len(self.accounts), self.path)

    def _take(self, found: KeysFile) -> None:
        accounts = {}
        for key in found.keys:
            account = self.accounts.get(key.id) or Account(key)
            account.key = key
            accounts[key.id] = account
        self.accounts = accounts
        self.owners = len({key.belongs_to for key in found.keys})
        if found.cache_salt_secret is not None:
            self.secret = found.cache_salt_secret.get_secret_value().encode()
