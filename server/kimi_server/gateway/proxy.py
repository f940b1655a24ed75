"""One proxied request, from its header to the access log: authentication, body, upstream call, errors."""

import secrets
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_server.gateway import headers
from kimi_server.gateway.access_log import AccessLogEntry
from kimi_server.gateway.errors import GatewayError, draining
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.keys.limits import KeyLimiter
from kimi_server.gateway.request.client import Client, ClientDisconnected
from kimi_server.gateway.request.parsed_request import parse_request
from kimi_server.gateway.routes import Route
from kimi_server.gateway.upstream_call import UpstreamCall


class ProxyResponse(Response):
    """Reads its request itself, so that no body is received before the key and the header are checked."""

    def __init__(self, gateway: Gateway, route: Route, path: str) -> None:
        self.gateway, self.route, self.path = gateway, route, path
        self.entry = AccessLogEntry(f"req-{secrets.token_hex(12)}", route.path, time.monotonic())
        self.limiter: KeyLimiter | None = None  # of the request's key, once that is known
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send, self.gateway.settings.limits)
        with self.gateway.track_request(), self.gateway.tracing.request(client, self.route.method, self.entry):
            try:
                await self._handle(client)
            except GatewayError as error:
                await self._send_error(client, error)
            except ClientDisconnected:
                self.entry.client_left()
            finally:
                self.gateway.record(self.entry)

    async def _handle(self, client: Client) -> None:
        gateway = self.gateway
        if gateway.draining:
            raise draining()
        limiter = self.limiter = gateway.keyring.authenticate(client.api_key)
        self.entry.key_id = limiter.key.id or None
        with limiter.request():
            client.check()
            try:
                body = await client.read_body(gateway.body_budget)
                parsed = await gateway.body_parser.parse(parse_request, body) if self.route.json_body else None
                call = UpstreamCall(gateway, self.route, self.path, self.entry, client, limiter, body, parsed)
                await client.run_until_disconnect(call.run())
            finally:
                client.release_body()

    async def _send_error(self, client: Client, error: GatewayError) -> None:
        """Send an error response. It is not called once a response has started."""
        self.entry.reject(error.status, error.reason)
        # The rest of a body that was not read may be on its way: it must not be taken for the next request.
        close = self.gateway.draining or not client.body_complete
        fields = error.headers | headers.of_gateway(self.entry, self.limiter, close)
        try:
            await client.start(error.status, headers.encode(fields))
            await client.write(error.body, more=False)
        except ClientDisconnected:
            self.entry.client_left()
