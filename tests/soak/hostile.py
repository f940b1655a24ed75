"""Bad replicas, and clients that mean no good: what the gateway of part 2 has behind and before it."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable

from kimi_demo.server import free_port
from tests.soak.asking import Tally, sentence_of

READ_SECONDS = 120
SENTENCE_BYTES = 1 << 16  # an error that is longer is no sentence
Act = Callable[["Client"], Awaitable[None]]


@contextlib.asynccontextmanager
async def bad_replicas() -> AsyncIterator[list[str]]:
    """URLs: nobody listens, a silent one, one of garbage, one that is healthy and answers all else with garbage."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while await reader.read(65536):
                pass
        writer.close()

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(65536)
            writer.write(b"\x16\x03\x01\x02\x00\xff\r\n\r\n" * 50)
            await writer.drain()
        writer.close()

    async def two_faced(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if (await reader.read(65536)).startswith(b"GET /health"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 20x \xff\r\n\r\n{")
            await writer.drain()
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        urls = [f"http://127.0.0.1:{free_port()}"]
        for handle in (silent, garbage, two_faced):
            listening = await asyncio.start_server(handle, "127.0.0.1", 0)
            await stack.enter_async_context(listening)
            urls.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        yield urls


class Client:
    """One connection to the gateway, of bytes."""

    def __init__(self, port: int, key: str, model: str, choose: random.Random, tally: Tally) -> None:
        self.port, self.key, self.model, self.choose, self.tally = port, key, model, choose, tally

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, body: bytes, length: int | None = None, key: str | None = None) -> None:
        """A request whose header says `length`."""
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self.key if key is None else key}\r\nconnection: close\r\n"
            f"content-length: {len(body) if length is None else length}\r\n\r\n"
        )
        with contextlib.suppress(OSError):  # it may be refused while it is sent
            self.writer.write(head.encode() + body)
            await self.writer.drain()

    def chat(self, tokens: int = 200) -> bytes:
        messages = [{"role": "user", "content": "What is the code of Ada Weber?"}]
        asked = {"model": self.model, "messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}
        return json.dumps(asked).encode()

    async def refused(self, what: str) -> None:
        """An error in a sentence has to come."""
        received = b""
        try:
            async with asyncio.timeout(READ_SECONDS):
                while len(received) < SENTENCE_BYTES and (chunk := await self.reader.read(65536)):
                    received += chunk
        except (OSError, TimeoutError):
            pass
        head, _, body = received.partition(b"\r\n\r\n")
        status = head[9:12].decode(errors="replace")
        self.tally.ended["hostile"] += 1
        if not (status[:1] in ("4", "5") and sentence_of(body.decode(errors="replace"))):
            self.tally.faults.append(f"{what} got {received[:200]!r}")


async def empty_objects(client: Client) -> None:
    count = client.choose.choice([1000, 50_000, 300_000])
    body = f'{{"model": {json.dumps(client.model)}, "messages": [' + ",".join(["{}"] * count) + "]}"
    await client.send(body.encode())
    await client.refused(f"{count} empty messages")


async def bad_json(client: Client) -> None:
    bodies = [b'{"messages": [', b"\xff\xfe\x00", b"[]", b'{"a":' + b"[" * 50_000, b"", b'"x"', b"{}{}", b"nul"]
    body = client.choose.choice(bodies)
    await client.send(body)
    await client.refused(f"the body {body[:20]!r}")


async def wrong_key(client: Client) -> None:
    await client.send(client.chat(), key=client.choose.choice(["", "sk-wrong", "\u00e9", "x" * 2000]))
    await client.refused("a wrong key")


async def too_large(client: Client) -> None:
    await client.send(b"{", length=1 << 40)
    await client.refused("a body of a terabyte")


async def left_in_the_body(client: Client) -> None:
    body = client.chat()
    await client.send(body[: client.choose.randrange(len(body))], length=len(body))


async def left_in_the_answer(client: Client) -> None:
    await client.send(client.chat(1000))
    for _ in range(client.choose.randrange(4)):
        async with asyncio.timeout(READ_SECONDS):
            if not await client.reader.read(1000):
                break


async def slow_reader(client: Client) -> None:
    await client.send(client.chat(300))
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(20):
            while await client.reader.read(50):
                await asyncio.sleep(0.2)


async def slow_header(client: Client) -> None:
    with contextlib.suppress(OSError):
        for byte in b"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\n":
            client.writer.write(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0.05)


ACTS: tuple[Act, ...] = (
    empty_objects,
    bad_json,
    wrong_key,
    too_large,
    left_in_the_body,
    left_in_the_answer,
    slow_reader,
    slow_header,
)
