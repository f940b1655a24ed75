"""Hostile input: every row is refused, by the status given, and nothing of it reaches a replica."""

import json
import socket
import time

import pytest

from tests.support.gateway import CHAT, Running, Start
from tests.support.upstream import Upstream

BODY = json.dumps(CHAT).encode()
LENGTH = b"content-length: %d\r\n" % len(BODY)
LIMITS = {"body_bytes": 4096, "header_bytes": 2048}
HASTY = {"header_seconds": 0.4, "body_seconds": 0.4}  # for what is meant to come too late, and for nothing else
CHAT_PATH = b"/v1/chat/completions"
CHUNKED = b"transfer-encoding: chunked\r\n"


def head(*lines: bytes, method: bytes = b"POST", path: bytes = CHAT_PATH, version: bytes = b"HTTP/1.1") -> bytes:
    first = method + b" " + path + b" " + version + b"\r\n"
    # `close`, so that whoever reads to the end need not wait for a connection to be given up as idle.
    return first + b"host: x\r\ncontent-type: application/json\r\nconnection: close\r\n" + b"".join(lines) + b"\r\n"


# what is sent -> (its bytes, the statuses that refuse it; 0: the connection is closed without an answer)
HOSTILE: dict[str, tuple[bytes, set[int]]] = {
    "two lengths that differ": (head(LENGTH, b"content-length: 5\r\n") + BODY, {400}),
    "two lengths that agree": (head(LENGTH, LENGTH) + BODY, {400}),
    "a list of lengths": (head(b"content-length: 5, 5\r\n") + BODY, {400}),
    "a negative length": (head(b"content-length: -5\r\n") + BODY, {400}),
    "a length with a sign": (head(b"content-length: +5\r\n") + BODY, {400}),
    "a length in hexadecimal": (head(b"content-length: 0x5\r\n") + BODY, {400}),
    "a length of 40 digits": (head(b"content-length: " + b"9" * 40 + b"\r\n") + BODY, {400}),
    "transfer-encoding and content-length": (head(LENGTH, CHUNKED) + b"0\r\n\r\n", {400}),
    "content-length and transfer-encoding": (head(CHUNKED, LENGTH) + b"0\r\n\r\n", {400}),
    "transfer-encoding unknown": (head(b"transfer-encoding: xchunked\r\n") + BODY, {400}),
    "transfer-encoding identity": (head(b"transfer-encoding: identity\r\n") + BODY, {400}),
    "chunked not last": (head(b"transfer-encoding: chunked, gzip\r\n") + BODY, {400}),
    "chunked in HTTP/1.0 with a length": (head(CHUNKED, LENGTH, version=b"HTTP/1.0") + BODY, {400}),
    "a chunk size that is no number": (head(CHUNKED) + b"zz\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk longer than it says": (head(CHUNKED) + b"3\r\nabcdef\r\n0\r\n\r\n", {400}),
    "a folded header": (head(b"x-a: b\r\n c: d\r\n", LENGTH) + BODY, {400}),
    "a folded length": (head(b"content-length:\r\n 5\r\n") + BODY, {400}),
    "a space before the colon": (head(b"content-length : 5\r\n") + BODY, {400}),
    "a space in a name": (head(b"x a: b\r\n", LENGTH) + BODY, {400}),
    "a NUL in a value": (head(b"x-a: b\0c\r\n", LENGTH) + BODY, {400}),
    "a NUL in a name": (head(b"x\0a: b\r\n", LENGTH) + BODY, {400}),
    "a bare CR in a value": (head(b"x-a: b\rx-b: c\r\n", LENGTH) + BODY, {400}),
    "a bare LF in a value": (head(b"x-a: b\nx-vllm-priority\0: 1\r\n", LENGTH) + BODY, {400}),
    "a header without a colon": (head(b"nonsense\r\n", LENGTH) + BODY, {400}),
    "an upgrade and two lengths": (head(b"connection: upgrade\r\nupgrade: h2c\r\n", LENGTH, LENGTH) + BODY, {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", {400}),
    "HTTP/9.9": (head(LENGTH, version=b"HTTP/9.9") + BODY, {400}),
    "a method that is none": (head(LENGTH, method=b"BREW") + BODY, {400}),
    "a method in small letters": (head(LENGTH, method=b"post") + BODY, {400}),
    "TRACE": (head(method=b"TRACE"), {405}),
    "CONNECT": (head(method=b"CONNECT", path=b"127.0.0.1:80"), {400}),
    "CONNECT to a path": (head(method=b"CONNECT", path=b"/v1/models"), {400}),
    "OPTIONS *": (head(method=b"OPTIONS", path=b"*"), {400, 404}),
    "a giant header": (head(b"x-a: " + b"b" * 5000 + b"\r\n", LENGTH) + BODY, {431}),
    "many headers": (head(*[b"x-%d: y\r\n" % n for n in range(500)], LENGTH) + BODY, {431}),
    "a giant path": (head(path=b"/v1/" + b"a" * 5000, method=b"GET"), {431}),
    "a giant name without an end": (b"GET / HTTP/1.1\r\n" + b"a" * 1_000_000, {0, 431}),
    "a giant first line without an end": (b"GET /" + b"a" * 1_000_000, {0, 431}),
    "a header that never ends": (b"GET / HTTP/1.1\r\nx: y\r\n", {408}),
    "nothing at all": (b"", {408}),
    "empty lines": (b"\r\n" * 10, {408}),
    "a body announced as huge": (head(b"content-length: 100000000\r\n"), {413}),
    "a huge body in chunks": (head(CHUNKED) + b"%x\r\n" % 9000 + b"x" * 9000 + b"\r\n", {413}),
    "a body that never comes": (head(LENGTH), {408}),
    "a body that stops": (head(LENGTH) + BODY[:10], {408}),
    "chunks that stop": (head(CHUNKED) + b"5\r\n{}", {408}),
    "bytes that are no UTF-8": (head(b"content-length: 3\r\n") + b"\xff\xfe\x00", {400}),
    "UTF-8 cut short": (head(b"content-length: 9\r\n") + b'{"a":"\xc3"}', {400}),
    "a surrogate in UTF-8": (head(b"content-length: 11\r\n") + b'{"a":"\xed\xa0\x80"}', {400}),
    "UTF-16": (head(b"content-length: 6\r\n") + b"\xff\xfe{\0}\0", {400}),
    "broken JSON": (head(b"content-length: 8\r\n") + b'{"messag', {400}),
    "JSON and more": (head(b"content-length: 4\r\n") + b"{}{}", {400}),
    "a JSON list": (head(b"content-length: 2\r\n") + b"[]", {400}),
    "an empty body": (head(b"content-length: 0\r\n"), {400}),
    "JSON nested without end": (head(b"content-length: 4000\r\n") + b"[" * 4000, {400}),
    "a query in another alphabet": (head(LENGTH, path=CHAT_PATH + b"?x=\xc3\xa9") + BODY, {400}),
}

PATHS = [
    *(b"/metrics", b"/metrics/"),
    *(b"/v1", b"/v1/", b"//v1/models", b"/v1//models", b"/v1/models//", b"/v1/./models", b"/V1/models"),
    *(b"//v1/models/", b"//elsewhere.example/", b"/%76%31/models/"),
    *(b"/v1/../metrics", b"/v1/models/../../metrics", b"/v1/%2e%2e/metrics", b"/v1/..%2fmetrics", b"/v1%2fmodels"),
    *(b"/%76%31/models", b"/v1/model%73", b"/v1/models%00", b"/v1/models;x=y", b"/v1/models%3f", b"/v1\\models"),
    *(
        b"/load",
        b"/version",
        b"/health",
        b"/ping",
        b"/tokenize",
        b"/invocations",
        b"/scale_elastic_ep",
        b"/server_info",
    ),
    *(b"/v1/load_lora_adapter", b"/v1/unload_lora_adapter", b"/v1/embeddings", b"/v1/nothing", b"/docs", b"/redoc"),
    *(b"/v1/responses/..", b"/v1/responses/a%2fb", b"/v1/responses/a.b", b"/v1/responses/" + b"a" * 200),
    b"http://127.0.0.1:1/metrics/x",
]


def send(gateway: Running, sent: bytes, seconds: float = 120) -> tuple[int, bytes]:
    """(the answer's status, all that came until the connection was closed); 0 for no answer."""
    received = b""
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
    return (int(received.split(b" ", 2)[1]) if received else 0), received


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def gateway(start_module: Start, upstream: Upstream) -> Running:
    return start_module(upstream, limits=LIMITS)


@pytest.fixture(scope="module")
def hasty(start_module: Start, upstream: Upstream) -> Running:
    return start_module(upstream, limits=LIMITS | HASTY)


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_hostile_is_passed_on(request: pytest.FixtureRequest, upstream: Upstream, what: str) -> None:
    upstream.seen.clear()
    sent, statuses = HOSTILE[what]
    gateway: Running = request.getfixturevalue("hasty" if 408 in statuses else "gateway")
    status, received = send(gateway, sent)
    assert status in statuses, received
    assert not upstream.seen
    assert received.count(b"HTTP/1.1 ") <= 1  # what followed was not taken for a second request
    if status not in (0, 405):
        error = json.loads(received.split(b"\r\n\r\n", 1)[1])["error"]
        assert error["code"] == status
        assert error["message"].endswith((".", "}")) and "Traceback" not in error["message"]
    gateway.until_idle()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.decode()[:40])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_no_path_but_the_listed_leads_anywhere(
    gateway: Running, upstream: Upstream, path: bytes, method: bytes
) -> None:
    upstream.seen.clear()
    body = (LENGTH, BODY) if method == b"POST" else (b"", b"")
    status, received = send(gateway, head(body[0], method=method, path=path) + body[1])
    assert status in (400, 404, 405), received
    assert not upstream.seen


def test_the_limits_leave_room_for_what_is_good(gateway: Running, upstream: Upstream) -> None:
    """A chunked body with a trailer: served."""
    upstream.seen.clear()
    chunks = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nx-vllm-priority: -9\r\n\r\n"
    status, received = send(gateway, head(CHUNKED) + chunks)
    assert status == 200, received
    [seen] = upstream.seen
    assert seen.body == BODY
    assert seen.header(b"x-vllm-priority") == [b"0"]  # a trailer is no header
    assert not seen.header(b"transfer-encoding")


@pytest.mark.parametrize("host", [b"x/metrics?", b"x/../../load#", b"@/metrics", b"", b"127.0.0.1:1"])
def test_the_host_header_decides_nothing(gateway: Running, upstream: Upstream, host: bytes) -> None:
    upstream.seen.clear()
    sent = b"GET /v1/models HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n"
    assert send(gateway, sent)[0] == 200
    [seen] = upstream.seen
    assert (seen.path, seen.query) == ("/v1/models", b"")
    assert seen.header(b"host") == [gateway.gateway.replicas.all[0].url.removeprefix("http://").encode()]


def test_a_connection_that_has_served_may_not_be_held_open_by_empty_lines(hasty: Running) -> None:
    address = ("127.0.0.1", int(hasty.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=120) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        end = time.monotonic() + 120
        try:
            while time.monotonic() < end:
                connection.sendall(b"\r\n")
                time.sleep(0.05)
        except (ConnectionResetError, BrokenPipeError):
            return
    raise AssertionError("the connection was still open")


def test_a_slow_header_is_not_waited_for(hasty: Running) -> None:
    """One byte at a time, each in time."""
    address = ("127.0.0.1", int(hasty.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=120) as connection:
        try:
            for byte in head(LENGTH, b"x-a: " + b"b" * 1000 + b"\r\n"):
                connection.sendall(bytes([byte]))
                time.sleep(0.01)
        except (ConnectionResetError, BrokenPipeError):
            return
        assert b" 408 " in connection.recv(65536)


def test_a_second_request_that_is_no_http_does_not_disturb_the_first_answer(start: Start) -> None:
    """Pipelined garbage: the answer in progress is cut, not mixed with an error."""
    gateway = start(Upstream(held=lambda body: True))
    head_kept = head(LENGTH).replace(b"connection: close\r\n", b"")
    status, received = send(gateway, head_kept + BODY + b"garbage\r\n\r\n")
    assert status == 0 and received == b""
    gateway.until_idle()


def sent_and_answered(gateway: Running, *parts: bytes, pause: float = 0.3) -> bytes:
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_pipelined_request_that_is_broken_says_nothing_inside_the_answer_before(start: Start) -> None:
    gateway = start(Upstream(pace=0.2))
    body = json.dumps(CHAT | {"stream": True}).encode()
    first = head(b"content-length: %d\r\n" % len(body)).replace(b"connection: close\r\n", b"") + body
    received = sent_and_answered(gateway, first, head(CHUNKED) + b"zz\r\n")
    assert received.count(b"HTTP/1.1 ") == 1 and received.startswith(b"HTTP/1.1 200")


def test_a_client_that_leaves_behind_a_pipelined_request_has_left(start: Start) -> None:
    upstream = Upstream(hold=60)
    gateway = start(upstream)
    first = head(LENGTH).replace(b"connection: close\r\n", b"") + BODY
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=60) as connection:
        connection.sendall(first + head(method=b"GET", path=b"/v1/models"))
        gateway.until(lambda: upstream.running == 1, "the replica has the request")
    gateway.until(lambda: upstream.cancelled == 1, "the replica is told")
    gateway.until_idle()


def test_space_behind_a_value_is_not_part_of_it(start: Start) -> None:
    upstream = Upstream()
    header = head(LENGTH).replace(b"application/json", b"application/json \t")
    assert sent_and_answered(start(upstream), header + BODY).startswith(b"HTTP/1.1 200")
    assert upstream.seen[0].header(b"content-type") == [b"application/json"]
