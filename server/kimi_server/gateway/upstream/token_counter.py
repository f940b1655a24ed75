"""How many tokens a prompt has, asked of a replica: for digits, code and CJK no ratio of bytes is right."""

import asyncio
import re
from collections import OrderedDict
from hashlib import blake2b

import httpx

from kimi_server.gateway.request.body_budget import pieces
from kimi_server.gateway.upstream.replicas import Replica

KNOWN = 4096  # prompts whose count is remembered
AT_ONCE = 4
SECONDS = 20.0
# What /tokenize answers begins with its count, and the ids follow; of /v1/messages/count_tokens it is the first, too.
COUNT = re.compile(rb'^\s*\{\s*"(?:count|input_tokens)":\s*(\d+)\s*[,}]')
ANSWER_BYTES = 4096


class Counts:
    """Each count is asked once, while it is remembered."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.known: OrderedDict[bytes, int] = OrderedDict()
        self.turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, replica: Replica, path: str, body: bytes) -> int | None:
        """The tokens of the prompt in `body`; None where the replica does not tell within SECONDS."""
        name = await asyncio.to_thread(lambda: blake2b(body, key=path.encode(), digest_size=16).digest())
        if name in self.known:
            self.known.move_to_end(name)
            return self.known[name]
        count = None
        try:
            async with asyncio.timeout(SECONDS), self.turns:
                if not self.client.is_closed:
                    count = await self._ask(replica, path, body)
        except (TimeoutError, httpx.HTTPError):
            return None
        if count is not None:
            self.known[name] = count
            if len(self.known) > KNOWN:
                self.known.popitem(last=False)
        return count

    async def _ask(self, replica: Replica, path: str, body: bytes) -> int | None:
        form = {"content-type": "application/json", "content-length": str(len(body))} | replica.headers
        begun = b""
        url = replica.at(path.encode())
        async with self.client.stream("POST", url, content=pieces(body), headers=form) as response:
            async for chunk in response.aiter_bytes():
                begun += chunk
                if (found := COUNT.match(begun)) or len(begun) > ANSWER_BYTES:
                    return int(found[1]) if found and response.status_code == 200 else None
        return None
