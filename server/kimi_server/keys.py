"""API keys: who may ask, how often, how much. The file holds hashes only, and is read again when it changes."""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from kimi_server.accounts import Account
from kimi_server.errors import Refusal
from kimi_server.settings import SettingsError, build, least, read_yaml

RELOAD_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """One entry of the file. A limit that is not given does not exist."""

    id: str
    sha256: str
    requests_per_minute: int | None = least(1, None)
    tokens_per_minute: int | None = least(1, None)  # prompt and completion
    concurrency: int | None = least(1, None)
    longest_context: int | None = least(1, None)  # tokens, as estimated, with the longest answer asked for


@dataclass(frozen=True)
class KeysFile:
    keys: tuple[Key, ...]


def fresh_key(key_id: str) -> tuple[str, str]:
    """(a new key, its entry in the file); the key itself is stored nowhere."""
    key = "sk-" + secrets.token_urlsafe(32)
    return key, f"- id: {key_id}\n  sha256: {digest(key)}"


def digest(key: str) -> str:
    # A fast hash is enough: a key is 256 random bits, not a password that could be guessed.
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file by id; raises SettingsError."""
    keys = build(KeysFile, read_yaml(path), str(path)).keys
    for key in keys:
        if not key.id:
            raise SettingsError(f"{path}: a key has an empty id: give it a name.")
        if len(key.sha256) != 64 or not set(key.sha256.lower()) <= set("0123456789abcdef"):
            raise SettingsError(f"{path}: sha256 of key {key.id!r} is not 64 hexadecimal digits: see `gateway key`.")
    found = {key.id: key for key in keys}
    if not keys or len(found) < len(keys):
        raise SettingsError(f"{path}: keys must be at least one, each with an id of its own.")
    return found


class Keyring:
    """The accounts by key id; `path` None lets everybody in under one account without limits."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.nobody = Account(Key("", ""))
        self.accounts: dict[str, Account] = {}
        self.seen: object = None
        if path is not None:
            self.seen = self._version(path)
            self._take(read_keys(path))

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

    def reload(self) -> None:
        """Read the file again if it changed. One that cannot be used leaves the keys as they were."""
        if self.path is None or (version := self._version(self.path)) == self.seen:
            return
        self.seen = version
        try:
            self._take(read_keys(self.path))
        except SettingsError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.warning("read %d keys from %s", len(self.accounts), self.path)

    async def watch(self) -> None:
        """Look for changes of the file for ever."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            self.reload()

    def _take(self, keys: dict[str, Key]) -> None:
        accounts = {}
        for key in keys.values():
            account = self.accounts.get(key.id) or Account(key)
            account.key = key
            accounts[key.id] = account
        self.accounts = accounts

    @staticmethod
    def _version(path: Path) -> object:
        """Differs from one state of the file to the next."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
