"""The body of a request as it is sent to a replica."""

import json
from collections.abc import AsyncIterator
from typing import Any

CHUNK_BYTES = 256 << 10


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """The body in chunks, so that the HTTP client does not buffer a second copy of it."""
    for at in range(0, len(body), CHUNK_BYTES):
        yield body[at : at + CHUNK_BYTES]


def with_fields(body: bytes, fields: dict[str, Any]) -> bytes:
    """A JSON object with `fields` added, in place of those of the same name.

    They are appended: of a duplicate name Python's parser, which vLLM uses, takes the last. No other byte changes.
    """
    if not fields:
        return body
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return body[:end] + comma + json.dumps(fields)[1:].encode() + body[end + 1 :]
