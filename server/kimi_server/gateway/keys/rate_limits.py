"""The `x-ratelimit-` headers of OpenAI: what a key may do in a minute, what is left of it, and when all of it is."""

from math import ceil

from kimi_server.gateway.keys.limits import KeyLimiter, TokenBucket

NAMES = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]


def rate_limit_headers(limiter: KeyLimiter) -> dict[str, str]:
    """Those of the limits that the key has; a prompt counts from when it was let in, an answer from its end."""
    key = limiter.key
    return _headers("requests", key.requests_per_minute, limiter.requests) | _headers(
        "tokens", key.tokens_per_minute, limiter.tokens
    )


def _headers(of: str, per_minute: int | None, bucket: TokenBucket) -> dict[str, str]:
    if per_minute is None:
        return {}
    bucket.wait(per_minute)  # refills
    return {
        f"x-ratelimit-limit-{of}": str(per_minute),
        f"x-ratelimit-remaining-{of}": str(max(0, int(per_minute - bucket.used))),
        f"x-ratelimit-reset-{of}": duration(bucket.used * 60 / per_minute),
    }


def duration(seconds: float) -> str:
    """0s, 120ms, 8s, 6m0s or 1h0m0s, rounded up, as OpenAI writes it."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
