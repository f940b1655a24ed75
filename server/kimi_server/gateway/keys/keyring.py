"""Authentication: which key a request presents. The file of keys is read again when it changes."""

import asyncio
import hmac
import logging
import secrets
from pathlib import Path

from kimi_server.gateway.config.yaml_file import SettingsError, read_bytes
from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.keys.keys_file import Key, KeysFile, digest, parse_keys
from kimi_server.gateway.keys.limits import KeyLimiter

RELOAD_SECONDS = 1.0

log = logging.getLogger(__name__)


class Keyring:
    """The limiters of all keys by key id. With `path` None every request is let in, under one key without limits.

    Raises SettingsError where the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.anonymous = KeyLimiter(Key("", ""))
        self.limiters: dict[str, KeyLimiter] = {}
        self.owners = 0
        self.secret = secrets.token_bytes(32)  # of the cache salts; the file's, where it gives one
        self._last_read: bytes | str = b""  # the file's bytes, or why it could not be read
        if path is not None:
            self._last_read = read_bytes(path)
            self._use(parse_keys(self._last_read, path))

    def authenticate(self, presented: str | None) -> KeyLimiter:
        """The limiter of a key as the client sent it; raises GatewayError 401. Takes equally long for every key."""
        if self.path is None:
            return self.anonymous
        if presented is None:
            raise GatewayError(401, "no_key", "An API key is needed: send it as `Authorization: Bearer KEY`.")
        asked, found = digest(presented), None
        for limiter in self.limiters.values():
            if hmac.compare_digest(asked, limiter.key.sha256.lower()):
                found = limiter
        if found is None:
            raise GatewayError(401, "unknown_key", "This API key is not known here.")
        return found

    def check_metrics(self, presented: str | None) -> None:
        """Raise GatewayError for a key that may not read the metrics, which cover all keys."""
        key = self.authenticate(presented).key
        if self.path is not None and not key.metrics:
            message = f"Key {key.id!r} may not read the metrics: its entry needs `metrics: true`."
            raise GatewayError(403, "metrics", message)

    def reload(self) -> None:
        """Read the file again. One that cannot be used is logged and leaves the keys as they were."""
        self._use_if_new(self._changed())

    async def watch(self) -> None:
        """Wait, then reload; the file is read in a thread, for a large one would block the event loop."""
        await asyncio.sleep(RELOAD_SECONDS)
        self._use_if_new(await asyncio.to_thread(self._changed))

    def _changed(self) -> KeysFile | None:
        """The file, if it is new and valid. Bytes are compared, since a change may leave the modification time."""
        if self.path is None:
            return None
        try:
            found: bytes | str = read_bytes(self.path)
        except SettingsError as error:
            found = str(error)
        if found == self._last_read:
            return None
        self._last_read = found
        try:
            if isinstance(found, str):
                raise SettingsError(found)
            return parse_keys(found, self.path)
        except SettingsError as error:
            log.error("the keys stay as they were: %s", error)
            return None

    def _use_if_new(self, found: KeysFile | None) -> None:
        if found is not None:
            self._use(found)
            log.info("read %d keys from %s", len(self.limiters), self.path)

    def _use(self, found: KeysFile) -> None:
        """Keep the limiter of a key that stays: what it has used outlives a reload."""
        limiters = {}
        for key in found.keys:
            limiter = self.limiters.get(key.id) or KeyLimiter(key)
            limiter.key = key
            limiters[key.id] = limiter
        self.limiters = limiters
        self.owners = len({key.cache_owner for key in found.keys})
        if found.cache_salt_secret is not None:
            self.secret = found.cache_salt_secret.get_secret_value().encode()
