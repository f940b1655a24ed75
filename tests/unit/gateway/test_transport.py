"""A replica that resets connections as they are made, as one that is killed does with those it has not accepted."""

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvloop

from kimi_server.gateway.upstream.transport import ReplicaTransport

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
RESET_EARLY = "the connection was reset as it was made"


@pytest.fixture
def resetting_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        choose = random.Random(0)

        def reset_all() -> None:
            with suppress(OSError):  # of the server's end
                while True:
                    connection, _ = server.accept()
                    time.sleep(choose.random() * 0.0003)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    connection.close()

        thread = threading.Thread(target=reset_all, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_connection_reset_at_any_moment_is_a_transport_error(resetting_port: int) -> None:
    url = f"http://127.0.0.1:{resetting_port}/health"

    async def ask_many() -> list[object]:
        async with httpx.AsyncClient(transport=ReplicaTransport()) as client:
            failures: list[object] = []
            while len(failures) < 4000 and RESET_EARLY not in map(str, failures):  # one in a hundred, or more
                asked = [client.post(url, content=b"x" * 1000) for _ in range(50)]
                failures += await asyncio.gather(*asked, return_exceptions=True)
            return failures

    # The loop that the gateway runs in: the other one tells of a reset by itself.
    failures = uvloop.run(ask_many())
    assert {type(one) for one in failures} <= {httpx.ConnectError, httpx.ReadError, httpx.WriteError}
    assert RESET_EARLY in map(str, failures)
