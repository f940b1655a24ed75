"""TLS on the port of the API. A certificate that is renewed in its file is used for connections from then on."""

import asyncio
import logging
import ssl
from pathlib import Path

from kimi_server.gateway.config.yaml_file import SettingsError

RELOAD_SECONDS = 60.0

log = logging.getLogger(__name__)


class Certificate:
    """`context` is what the server takes; raises SettingsError for files that cannot be used."""

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        self.certfile, self.keyfile = certfile, keyfile
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._last_read = self._read()
        self._load(self.context)

    async def watch(self) -> None:
        """Wait, then load the files again if they are others. Those that cannot be used leave the certificate."""
        await asyncio.sleep(RELOAD_SECONDS)
        try:
            found = self._read()
            if found == self._last_read:
                return
            self._last_read = found
            self._load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))  # first where a failure does no harm
            self._load(self.context)
        except SettingsError as error:
            log.error("the certificate stays as it was: %s", error)
        else:
            log.info("read the certificate in %s again", self.certfile)

    def _read(self) -> tuple[bytes, bytes]:
        try:
            return self.certfile.read_bytes(), self.keyfile.read_bytes()
        except OSError as error:
            raise SettingsError(f"{error.filename} cannot be read: {error.strerror}.") from None

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # A password is asked for on the terminal otherwise, which a server has not.
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            files = f"ssl_certfile {self.certfile} and ssl_keyfile {self.keyfile}"
            raise SettingsError(
                f"{files} cannot be used ({getattr(error, 'reason', None) or error}): give a certificate and its key, "
                "both PEM and without a password."
            ) from None
