"""Exact prompt token counts, from a replica's tokenizer: for digits, code and CJK the estimate is too far off."""

import asyncio
import re
from collections import OrderedDict
from hashlib import blake2b

import httpx

from kimi_server.gateway.upstream.body import chunks
from kimi_server.gateway.upstream.replicas import Replica

CACHED_COUNTS = 4096
MAX_CONCURRENT = 4
TIMEOUT_SECONDS = 20.0
# The response of /tokenize begins with the count and goes on with the ids, which are not read; that of
# /v1/messages/count_tokens begins with it, too.
COUNT = re.compile(rb'^\s*\{\s*"(?:count|input_tokens)":\s*(\d+)\s*[,}]')
MAX_RESPONSE_BYTES = 4096  # in which the count must stand


class TokenCounter:
    """Caches the latest CACHED_COUNTS counts by a hash of path and body."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.cache: OrderedDict[bytes, int] = OrderedDict()
        self.slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def count(self, replica: Replica, path: str, body: bytes) -> int | None:
        """Tokens of the prompt in `body`; None where the replica does not say within TIMEOUT_SECONDS."""
        key = await asyncio.to_thread(lambda: blake2b(body, key=path.encode(), digest_size=16).digest())
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        count = None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), self.slots:
                if not self.client.is_closed:
                    count = await self._request(replica, path, body)
        except (TimeoutError, httpx.HTTPError):
            return None
        if count is not None:
            self.cache[key] = count
            if len(self.cache) > CACHED_COUNTS:
                self.cache.popitem(last=False)
        return count

    async def _request(self, replica: Replica, path: str, body: bytes) -> int | None:
        headers = {"content-type": "application/json", "content-length": str(len(body))} | replica.headers
        received = b""
        url = replica.url_for(path.encode())
        async with self.client.stream("POST", url, content=chunks(body), headers=headers) as response:
            async for chunk in response.aiter_bytes():
                received += chunk
                if (found := COUNT.match(received)) or len(received) > MAX_RESPONSE_BYTES:
                    return int(found[1]) if found and response.status_code == 200 else None
        return None
