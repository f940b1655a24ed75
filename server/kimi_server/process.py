"""The gateway as a process: uvicorn, which on a signal drains before it stops."""

import asyncio
import socket
from types import FrameType

import uvicorn

from kimi_server.app import build
from kimi_server.connection import limited
from kimi_server.gateway import Gateway

LAST_SECONDS = 5  # for what is still there after the drain


class Server(uvicorn.Server):
    """A first SIGTERM or SIGINT drains, a second stops at once."""

    def __init__(self, gateway: Gateway) -> None:
        settings = gateway.settings
        config = uvicorn.Config(
            build(gateway),
            host=settings.host,
            port=settings.port,
            http=limited(settings.limits.header_bytes, settings.limits.header_seconds),
            ws="none",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_level="warning",
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self.gateway = gateway
        self.draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self.gateway.drain()
        self.should_exit = True
