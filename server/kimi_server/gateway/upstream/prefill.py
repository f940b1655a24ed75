"""Servers that read long prompts for the replicas: vLLM's prefill and decode apart.

A prefill server reads the prompt for one token. The replica that answers then gets what was read, latents and states,
from it by the P2P tier of vLLM's OffloadingConnector. Without that, for whatever reason, it reads the prompt itself.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Sequence
from typing import Any

import httpx

from kimi_server.gateway.access_log import AccessLogEntry
from kimi_server.gateway.config.settings import PrefillSettings
from kimi_server.gateway.metrics import Metrics
from kimi_server.gateway.routes import Route
from kimi_server.gateway.routing import replica_order
from kimi_server.gateway.upstream.body import chunks, with_fields
from kimi_server.gateway.upstream.replicas import Replica, Replicas
from kimi_server.gateway.upstream.response import UpstreamResponse

PARAMETERS = "kv_transfer_params"  # vLLM's field
# A prompt read for one token, whatever answer is asked for.
ONE_TOKEN = {"stream": False, "stream_options": None, "min_tokens": 0}

log = logging.getLogger(__name__)


async def address(host: str, port: int) -> tuple[str, int]:
    """With the host's number, which is the name that its tier goes by; where it has none the replica finds nobody."""
    with contextlib.suppress(OSError):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return str(min(found)[4][0]), port  # IPv4 first
    return host, port


class PrefillServers:
    def __init__(self, settings: Sequence[PrefillSettings], client: httpx.AsyncClient, metrics: Metrics) -> None:
        self.settings, self.client, self.metrics = settings, client, metrics
        self.servers = Replicas(settings, on_change=lambda: None, called="prefill server")

    async def read(self, route: Route, body: bytes, entry: AccessLogEntry) -> dict[str, Any]:
        """Have a long prompt read; the fields that tell a replica where it is, none where it was not read.

        A session's prompts go to the same server, which has the earlier ones in its cache.
        """
        if not (self.settings and route.transfers and entry.lane == "long"):
            return {}
        name = secrets.token_hex(16)
        order = replica_order(self.servers.all, entry.session)
        role = await self._ask(self.servers.all[order[0]], name, route, body, entry) if order else None
        self.metrics.prefills.labels("read" if role else "failed").inc()
        if role is None:
            return {}
        host, port = await address(*self.settings[order[0]].place)
        return {PARAMETERS: {role: {"kv_request_id": name, "remote_host": host, "remote_port": port}}}

    async def _ask(self, server: Replica, name: str, route: Route, body: bytes, entry: AccessLogEntry) -> str | None:
        """What the server is to the replica once it has read the prompt of `body`; None if it has not.

        vLLM hands over under a name what a request reads. Of what was in its cache before, states are not offered
        again: then the replica is to look what is in the server's host memory.
        """
        fields = ONE_TOKEN | dict.fromkeys(route.output_limit_fields, 1)
        asked = with_fields(body, {**fields, PARAMETERS: {"remote_decoder": {"kv_request_id": name}}})
        headers = {"content-type": "application/json", "content-length": str(len(asked)), **server.headers}
        headers["x-request-id"] = entry.request_id
        if server.rank is not None:
            headers["x-data-parallel-rank"] = str(server.rank)
        if self.client.is_closed:  # by the drain
            return None
        try:
            with server.track_request():
                url = server.url_for(route.path.encode())
                reply = await self.client.post(url, content=chunks(asked), headers=headers)
        except httpx.TransportError as error:
            server.probe_requested.set()
            log.warning("prefill server %d read no prompt: %s", server.index, str(error) or type(error).__name__)
            return None
        if reply.status_code != 200:  # where the request is at fault the replica says so
            log.warning("prefill server %d answered a prompt with %d", server.index, reply.status_code)
            return None
        answer = UpstreamResponse(reply.headers.get("content-type", ""))
        answer.feed(reply.content)
        answer.finish()
        return "remote_kv_source" if answer.usage.cached_tokens else "remote_prefiller"
