"""Which headers cross the gateway. Towards a replica only those listed here; back, all but those of one connection."""

from collections.abc import Iterable

from kimi_server.gateway.errors import Refusal

Headers = list[tuple[bytes, bytes]]

# All that vLLM reads, and what decides about the form of the answer. Credentials stop here, as does what would let a
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
# Those of one connection (RFC 9110, 7.6.1), and the two that our own server writes.
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


def check_framing(headers: Headers, body_bytes: int) -> None:
    """Refuse what could be read in two ways, and a body announced as too large."""
    lengths = [value for name, value in headers if name == b"content-length"]
    coded = any(name == b"transfer-encoding" for name, _ in headers)
    if len(lengths) > 1 or (lengths and coded):
        raise Refusal(400, "framing", "The request gives the length of its body more than once: send one header.")
    if lengths and int(lengths[0]) > body_bytes:
        raise too_large(body_bytes)


def announced(headers: Headers, most: int) -> int:
    """The bytes of the body that may come: what is announced, or `most` where it comes in chunks."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return most
    return int(first(headers, b"content-length") or 0)


def too_large(body_bytes: int) -> Refusal:
    message = f"The request body is larger than {body_bytes} bytes, the limit of this gateway."
    return Refusal(413, "body_bytes", message)


def to_replica(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if name in TO_REPLICA]


def without_upgrade(headers: Headers) -> Headers:
    """The header of a request that does not ask for another protocol."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
        if name not in (b"upgrade", b"http2-settings"):
            kept.append((name, value))
    return kept


def to_client(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    lowered = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in lowered if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in lowered if name not in NOT_TO_CLIENT and name not in named]


def first(headers: Headers, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def presented_key(headers: Headers) -> str | None:
    """The API key as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, key = (first(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else first(headers, b"x-api-key")
