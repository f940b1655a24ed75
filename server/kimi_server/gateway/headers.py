"""Which headers pass: to a replica an allow-list; to the client all but the hop-by-hop ones."""

from collections.abc import Iterable

from kimi_server.gateway.access_log import AccessLogEntry
from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.keys.limits import KeyLimiter
from kimi_server.gateway.keys.rate_limits import rate_limit_headers

Headers = list[tuple[bytes, bytes]]

# All that vLLM reads, and what decides about the response's format. Credentials are not passed on, nor what would let a
# client choose its priority, its data-parallel rank or its request id.
TO_REPLICA = {
    b"accept",
    b"accept-encoding",
    b"anthropic-beta",
    b"anthropic-version",
    b"content-type",
    b"endpoint-load-metrics-format",
    b"traceparent",
    b"tracestate",
    b"user-agent",
    b"x-session-id",
}
# Hop-by-hop (RFC 9110, 7.6.1), and those that the gateway sets itself.
NOT_TO_CLIENT = {
    b"connection",
    b"date",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-connection",
    b"server",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"x-request-id",
}

RETRY_SECONDS = b"5"  # where a replica that is overloaded does not say when to try again


def check_framing(headers: Headers, body_bytes: int) -> None:
    """Raise GatewayError for ambiguous framing (request smuggling) and for a body announced as too large."""
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if len(lengths) > 1 or (lengths and chunked):
        raise GatewayError(400, "framing", "The request gives the length of its body more than once: send one header.")
    if lengths and int(lengths[0]) > body_bytes:
        raise too_large(body_bytes)


def expected_body_bytes(headers: Headers, most: int) -> int:
    """The Content-Length; `most` where the body comes in chunks."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return most
    return int(first(headers, b"content-length") or 0)


def too_large(body_bytes: int) -> GatewayError:
    message = f"The request body is larger than {body_bytes} bytes, the limit of this gateway."
    return GatewayError(413, "body_bytes", message)


def to_replica(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if name in TO_REPLICA]


def without_upgrade(headers: Headers) -> Headers:
    """The header without the request to change to another protocol."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
        if name not in (b"upgrade", b"http2-settings"):
            kept.append((name, value))
    return kept


def to_client(status: int, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """A replica's header for the client; a 429 or 503 without Retry-After gets one."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in lowered if name == b"connection" for token in value.split(b",")}
    kept = [(name, value) for name, value in lowered if name not in NOT_TO_CLIENT and name not in named]
    if status in (429, 503) and first(kept, b"retry-after") is None:
        kept.append((b"retry-after", RETRY_SECONDS))
    return kept


def of_gateway(entry: AccessLogEntry, limiter: KeyLimiter | None, close: bool) -> dict[str, str]:
    """The headers that the gateway adds to a response; with `close` the connection ends with it.

    `limiter` is that of the request's key, None where it has none.
    """
    fields = {"x-request-id": entry.request_id}
    if limiter is not None:
        fields |= rate_limit_headers(limiter)
    if entry.queue_seconds is not None:
        fields["x-kimi-queue-seconds"] = f"{entry.queue_seconds:.4f}"
    if entry.replica is not None:
        fields["x-kimi-replica"] = str(entry.replica)
    if entry.lane is not None:
        fields["x-kimi-lane"] = entry.lane
    if close:
        fields["connection"] = "close"
    return fields


def encode(fields: dict[str, str]) -> Headers:
    return [(name.encode(), value.encode()) for name, value in fields.items()]


def first(headers: Headers, name: bytes) -> str | None:
    """The value of the first header of this name, in lower case; None if there is none."""
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def api_key(headers: Headers) -> str | None:
    """The API key of `Authorization: Bearer`, as OpenAI's clients send it, or of `x-api-key`, as Anthropic's do."""
    scheme, _, key = (first(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else first(headers, b"x-api-key")
