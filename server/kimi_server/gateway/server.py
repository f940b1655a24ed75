"""The gateway's uvicorn server, which drains on a signal before it stops."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from kimi_server.gateway.app import build, metrics_app
from kimi_server.gateway.config.settings import Settings
from kimi_server.gateway.config.yaml_file import SettingsError
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.request.connection import limited_protocol

SHUTDOWN_SECONDS = 5  # for connections that are open after the drain
# Longer than what clients and load balancers keep an idle connection for: whoever closes first must be the client, or
# its next request may meet the end of the connection.
IDLE_SECONDS = 75

log = logging.getLogger(__name__)


def config(app: ASGIApp, settings: Settings, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(settings.limits.header_bytes, settings.limits.header_seconds),
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        timeout_keep_alive=IDLE_SECONDS,
        **more,
    )


class Server(uvicorn.Server):
    """A first SIGTERM or SIGINT drains, a second stops at once. `failed`: the drain raised an exception."""

    def __init__(self, gateway: Gateway) -> None:
        settings = gateway.settings
        where = {"host": settings.host, "port": settings.port}
        own = config(build(gateway), settings, timeout_graceful_shutdown=SHUTDOWN_SECONDS, **where)
        if gateway.certificate is not None:
            own.load()
            own.ssl = gateway.certificate.context
        super().__init__(own)
        self.gateway = gateway
        self.draining: asyncio.Task[None] | None = None
        self.failed = False
        self.metrics_port: int | None = None  # while it is open

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises SettingsError where the metrics' port cannot be bound."""
        self.loop = asyncio.get_running_loop()
        async with self._metrics():
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        settings, keyring = self.gateway.settings, self.gateway.keyring
        if self.started:
            where = f"{'http' if self.gateway.certificate is None else 'https'}://{settings.host}:{settings.port}"
            keys = "no keys" if keyring.path is None else f"{len(keyring.limiters)} keys"
            log.info("listening on %s, with %d replicas and %s", where, len(settings.replicas), keys)

    @contextlib.asynccontextmanager
    async def _metrics(self) -> AsyncIterator[None]:
        """Serve the metrics on their own port, if they have one: a second uvicorn server would handle signals, too."""
        settings = self.gateway.settings
        if settings.metrics_port is None:
            yield
            return
        own, state = config(metrics_app(self.gateway), settings), ServerState()
        own.load()

        def connection() -> asyncio.Protocol:
            return own.http_protocol_class(config=own, server_state=state, app_state={})  # type: ignore[call-arg]

        try:
            server = await self.loop.create_server(connection, settings.metrics_host, settings.metrics_port)
        except OSError as error:
            where = f"metrics_host {settings.metrics_host!r}, metrics_port {settings.metrics_port}"
            raise SettingsError(f"{where} cannot be used ({error.strerror}): name others.") from None
        self.metrics_port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for one in list(state.connections):
                one.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        """Drain, and stop the process whether or not that works."""
        try:
            await self.gateway.drain()
        except Exception:
            log.exception("the drain failed")
            self.failed = True
        finally:
            self.should_exit = True
