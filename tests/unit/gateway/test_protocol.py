"""Clients that speak HTTP in their own way, and are served as vLLM serves them."""

import json
import socket
import time

import httpx
import pytest

from tests.support.gateway import CHAT, Running, Start
from tests.support.upstream import Upstream

BODY = json.dumps(CHAT).encode()
STREAM = json.dumps(CHAT | {"stream": True}).encode()
# As the HTTP client of the JDK sends it with every request to an http:// address.
H2C = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n"
WEBSOCKET = "Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def gateway(start_module: Start, upstream: Upstream) -> Running:
    return start_module(upstream, cors_origins=(PAGE,))


def post(body: bytes, fields: str = "", version: str = "1.1") -> bytes:
    length = f"content-length: {len(body)}\r\n"
    return f"POST /v1/chat/completions HTTP/{version}\r\nhost: x\r\n{length}{fields}\r\n".encode() + body


def converse(gateway: Running, *pieces: bytes) -> bytes:
    """All that comes on one connection, on which each piece is sent when the answer to the one before began."""
    received = b""
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            received += connection.recv(65536)
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.mark.parametrize("wish", [H2C, WEBSOCKET])
def test_a_wish_to_upgrade_is_ignored(gateway: Running, upstream: Upstream, wish: str) -> None:
    """With and without a body, in pieces and pipelined, on one connection that stays."""
    upstream.seen.clear()
    get = f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{wish}\r\n".encode()
    last = post(BODY, wish).replace(b"host: x", b"host: x\r\nconnection: close")
    received = converse(gateway, post(BODY, wish), get, post(BODY, wish) + last)
    assert received.count(b"HTTP/1.1 200 OK") == 4, received
    assert sorted((seen.path, seen.body) for seen in upstream.seen) == [
        *[("/v1/chat/completions", BODY)] * 3,
        ("/v1/models", b""),
    ]
    assert not any(seen.header(b"upgrade") or seen.header(b"http2-settings") for seen in upstream.seen)


def test_a_wish_to_upgrade_with_a_body_in_chunks_that_comes_slowly(gateway: Running, upstream: Upstream) -> None:
    upstream.seen.clear()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n{H2C}\r\n".encode()
    sent = head + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=10) as connection:
        for byte in sent:
            connection.sendall(bytes([byte]))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
    assert [seen.body for seen in upstream.seen] == [BODY]


@pytest.mark.parametrize("query", [b"a=%20b", b"a=b:c", b"a=b+c/d?e", b"x=%0d%0ax-vllm-priority:1", b"a[]=(1,2)"])
def test_a_query_passes_unchanged(gateway: Running, upstream: Upstream, query: bytes) -> None:
    upstream.seen.clear()
    sent = b"GET /v1/models?" + query + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert b" 200 OK" in converse(gateway, sent)
    [seen] = upstream.seen
    assert seen.query == query
    assert not seen.header(b"x-vllm-priority")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_slash_at_the_end_of_a_path_is_sent_on(gateway: Running, upstream: Upstream, method: str) -> None:
    """To where it would have been right, and not to a host that somebody named."""
    path = "/v1/models" if method == "GET" else "/v1/chat/completions"
    with gateway.client(headers={"host": "elsewhere.example"}) as client:
        reply = client.request(method, f"{path}/?a=%20", content=BODY if method == "POST" else None)
        assert (reply.status_code, reply.headers["location"]) == (307, f"{path}?a=%20")
    with gateway.client(follow_redirects=True) as client:
        assert client.request(method, f"{path}/", content=BODY if method == "POST" else None).status_code == 200


def test_a_byte_order_mark_is_no_error(gateway: Running, upstream: Upstream) -> None:
    upstream.seen.clear()
    body = b"\xef\xbb\xbf" + BODY
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", content=body).status_code == 200
    assert upstream.seen[0].body == body


def test_an_idle_connection_stays_for_as_long_as_a_client_may_take_it_again(gateway: Running) -> None:
    """httpx gives one up after 5 seconds: a server that does so at the same moment cuts off its next request."""
    where = ("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]))
    with socket.create_connection(where, timeout=10) as connection:
        for pause in (0, 6):
            time.sleep(pause)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_http_1_0_gets_no_chunks(gateway: Running, upstream: Upstream, body: bytes) -> None:
    head, _, answer = converse(gateway, post(body, "connection: keep-alive\r\n", "1.0")).partition(b"\r\n\r\n")
    assert b" 200 OK" in head and b"connection: close" in head
    assert b"transfer-encoding" not in head
    if body is STREAM:
        assert b"content-length" not in head
        assert answer == b"".join(upstream.transcript())
    else:
        assert json.loads(answer)["choices"]


def test_pages_of_the_listed_origins_may_ask(gateway: Running) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with gateway.client() as client:
        preflight = client.options("/v1/chat/completions", headers={"origin": PAGE, **ask})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for content, status in ((STREAM, 200), (BODY, 200), (b"[]", 400)):
            reply = client.post("/v1/chat/completions", content=content, headers={"origin": PAGE})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, PAGE)
            assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
        other = {"origin": "https://other.example"}
        assert client.options("/v1/chat/completions", headers=other | ask).status_code == 400
        reply = client.post("/v1/chat/completions", content=BODY, headers=other)
        assert "access-control-allow-origin" not in reply.headers


def test_no_page_may_ask_by_default(start: Start) -> None:
    gateway = start(Upstream())
    reply = httpx.post(f"{gateway.url}/v1/chat/completions", content=BODY, headers={"origin": PAGE}, trust_env=False)
    assert reply.status_code == 200
    assert not any(name.startswith("access-control") for name in reply.headers)
