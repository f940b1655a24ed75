"""The HTTP transport to replicas: every failure of a connection is an httpx.TransportError, whatever the event loop."""

import httpx


class ReplicaTransport(httpx.AsyncHTTPTransport):
    """A connection for each request: a replica may close an idle one at the moment that a request takes it."""

    def __init__(self) -> None:
        super().__init__(trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError where the replica cannot be reached or breaks the connection."""
        try:
            return await super().handle_async_request(request)
        except AttributeError as error:
            # uvloop gives no socket of a connection that the replica has reset since it was made, as one that is
            # killed does; anyio, behind httpx, asks that socket for its peer.
            if error.name != "getpeername":
                raise
            raise httpx.ConnectError("the connection was reset as it was made", request=request) from error
