"""A client of two servers, of which one reads the prompts and the other answers, by vLLM's P2P tier."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from kimi_demo.server import Server
from tests.support import patience
from tests.support.completions import Answer, Completions


class PrefillDecode(Completions):
    """Sends a prompt to the prefill server for one token, and then to the decode server, whose answer it is.

    `port`: where the prefill server hands out what it has read. `probe`: the decode server asks first what is there.
    """

    def __init__(self, prefill: Server, decode: Server, port: int, probe: bool = False) -> None:
        super().__init__(decode)
        self.prefill, self.port, self.probe = Completions(prefill), port, probe

    async def ask(self, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int, **more: Any) -> Answer:
        return await super().ask(client, prompt, tokens, **await self.read(prompt, **more), **more)

    async def stream(
        self, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int, **more: Any
    ) -> AsyncGenerator[Answer, None]:
        async for answer in super().stream(client, prompt, tokens, **await self.read(prompt, **more), **more):
            yield answer

    async def read(self, prompt: Sequence[int], **more: Any) -> dict[str, Any]:
        """Where the decode server finds the prompt, read or, if the prefill server does not answer, not."""
        name = uuid.uuid4().hex
        sent = {} if self.probe else {"kv_transfer_params": {"remote_decoder": {"kv_request_id": name}}}
        url = f"{self.prefill.server.url}/v1/completions"
        try:
            async with httpx.AsyncClient(timeout=patience.SECONDS, trust_env=False) as client:
                reply = await client.post(url, json=self.prefill.body(prompt, 1, **sent, **more))
            assert reply.status_code == 200, reply.text
        except httpx.TransportError:
            pass
        found = {"kv_request_id": name, "remote_host": "127.0.0.1", "remote_port": self.port}
        return {"kv_transfer_params": {"remote_kv_source" if self.probe else "remote_prefiller": found}}

    async def until_idle(self, seconds: float = 60) -> None:
        await super().until_idle(seconds)
        await self.prefill.until_idle(seconds)
