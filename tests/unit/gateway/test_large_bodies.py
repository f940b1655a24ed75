"""Large bodies: read elsewhere, without being built, and held only as far as there is room."""

import asyncio
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.request import parsed_request
from kimi_server.gateway.request.body_budget import BodyBudget
from kimi_server.gateway.request.body_parser import INLINE_BYTES, BodyParser
from kimi_server.gateway.request.parsed_request import parse_request
from kimi_server.gateway.upstream.body import with_fields
from tests.support.gateway import CHAT, Start
from tests.support.upstream import Upstream

MIB = 1 << 20


def objects(size: int) -> bytes:
    return b'{"messages":[' + b",".join([b"{}"] * (size // 3)) + b"]}"


BODIES: dict[str, Callable[[int], bytes]] = {
    "objects": objects,
    "texts": lambda size: b'{"prompt":[' + b",".join([b'""'] * (size // 3)) + b"]}",
    "ids": lambda size: b'{"prompt":[' + b",".join([b"12345"] * (size // 6)) + b"]}",
    "fields": lambda size: b"{" + b",".join(b'"%08x":1' % n for n in range(size // 13)) + b"}",
    "escapes": lambda size: b'{"prompt":"' + b"\\u4e2d" * (size // 6) + b'"}',
    "one emoji": lambda size: b'{"prompt":"' + "😀".encode() + b"x" * size + b'"}',
}


@pytest.mark.parametrize("kind", BODIES)
def test_reading_builds_nothing_of_a_body(kind: str) -> None:
    body = BODIES[kind](MIB)
    parse_request(b"{}")
    tracemalloc.start()
    try:
        parse_request(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB  # windows, and a list of what is cut out of one
    finally:
        tracemalloc.stop()


class Spy:
    """The decoder, with the sizes of what it was given in this process."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.sizes = decoder, list[int]()

    def decode(self, body: bytes) -> Any:
        self.sizes.append(len(body))
        return self.decoder.decode(body)


def test_no_large_body_is_read_in_the_event_loop(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(parsed_request.ENVELOPE)
    monkeypatch.setattr(parsed_request, "ENVELOPE", spy)
    upstream = Upstream()
    gateway = start(upstream)
    large = json.dumps(CHAT | {"documents": "x" * INLINE_BYTES}).encode()
    with gateway.client() as client:
        for body in (large, json.dumps(CHAT).encode(), large):
            reply = client.post("/v1/chat/completions", content=body)
            assert (reply.status_code, upstream.seen[-1].body) == (200, body)
        assert client.post("/v1/chat/completions", content=large[:-1]).status_code == 400
    gateway.until_idle()
    assert spy.sizes == [len(json.dumps(CHAT))]
    sessions = {line["session"] for line in gateway.lines if line["status"] == 200}
    assert len(sessions) == 1
    assert gateway.gateway.body_budget.reserved == 0


def test_a_reader_that_dies_is_followed_by_another() -> None:
    async def test() -> None:
        parser, body = BodyParser(), objects(2 * INLINE_BYTES)
        try:
            with pytest.raises(GatewayError) as refused:
                await parser.parse(exec, b"import os; os._exit(1)  #" + b"x" * INLINE_BYTES)
            assert (refused.value.status, refused.value.reason) == (503, "reader_lost")
            assert (await parser.parse(parse_request, body)).size.text_bytes == 0
            assert parser.pool is not None
            [process] = parser.pool._processes.values()
            process.kill()
            while not parser.pool._broken:
                await asyncio.sleep(0.005)
            assert (await parser.parse(parse_request, body)).size.text_bytes == 0
        finally:
            parser.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_body_whose_client_left_is_done_with_before_the_next_one_is_read() -> None:
    async def test() -> None:
        parser, body = BodyParser(), objects(2 * INLINE_BYTES)
        try:
            await parser.parse(parse_request, body)
            first = asyncio.create_task(parser.parse(parse_request, body))
            while not parser.turn.locked():
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait({first})
            assert first.cancelled() and parser.turn.locked()
            assert (await parser.parse(parse_request, body)).size.text_bytes == 0
            assert not parser.turn.locked()
        finally:
            parser.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_reader_ends_with_the_process_that_needs_it() -> None:
    script = """if True:
        import asyncio, time
        from kimi_server.gateway.request.parsed_request import parse_request
        from kimi_server.gateway.request.body_parser import INLINE_BYTES, BodyParser

        async def main():
            parser = BodyParser()
            await parser.parse(parse_request, b'{"prompt":"' + b"x" * INLINE_BYTES + b'"}')
            print(*[process.pid for process in parser.pool._processes.values()], flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        reader = psutil.Process(int(process.stdout.readline()))
        process.kill()
        reader.wait(30)


def test_bodies_wait_for_room_in_their_order() -> None:
    async def test() -> None:
        budget = BodyBudget(10 * MIB)
        first = await budget.reserve(8 * MIB)
        waiting = [asyncio.create_task(budget.reserve(size * MIB)) for size in (4, 2, 2, 20)]
        await asyncio.sleep(0)
        small = await budget.reserve(1000)  # does not wait
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [False, True, False, False]
        first.shrink(5 * MIB)
        second = await waiting[0]
        await asyncio.sleep(0)
        assert not waiting[2].done()
        first.release()
        third = await waiting[2]
        await asyncio.sleep(0)
        assert not waiting[3].done()  # larger than all the room: alone, or beside small ones that are gone
        for reservation in (first, second, third, small):
            reservation.release()
            reservation.release()
        last = await waiting[3]
        assert budget.reserved == last.size == 20 * MIB

    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_body_for_which_there_is_no_room_in_time_is_refused(start: Start) -> None:
    upstream = Upstream(hold=600)
    gateway = start(upstream, limits={"body_seconds": 0.3, "bodies_bytes": MIB})
    body = objects(MIB - 1000)

    async def fill() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while not upstream.seen:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(ask)
        writer.close()

    def ask() -> None:
        with gateway.client() as client:
            reply = client.post("/v1/chat/completions", content=body)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert "room" in reply.json()["error"]["message"]
            assert client.post("/v1/chat/completions", content=b"[]").status_code == 400  # a small one is read

    asyncio.run(asyncio.wait_for(fill(), 20))
    gateway.until_idle()
    assert gateway.gateway.body_budget.reserved == 0


def test_a_body_is_let_go_with_the_first_byte_of_its_answer(start: Start) -> None:
    upstream = Upstream(tokens=100_000, pace=0.01)
    gateway = start(upstream)
    body = CHAT | {"stream": True, "documents": "x" * MIB}
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        chunks = reply.iter_raw()  # kept: dropping it would close the connection
        next(chunks)
        assert gateway.gateway.body_budget.reserved == 0
        assert len(upstream.seen[0].body) > MIB


def test_fields_are_added_at_the_end() -> None:
    assert with_fields(b' {"a": "}" } \n', {"b": 1}) == b' {"a": "}" ,"b": 1} \n'
    assert with_fields(b"{ }", {"b": 1}) == b'{ "b": 1}'
    assert with_fields(b"{}", {}) == b"{}"


def test_many_large_bodies_at_once(start: Start) -> None:
    """More than there is room for: all are served in the end, each with its own bytes."""
    upstream = Upstream()
    gateway = start(upstream, limits={"bodies_bytes": 3 * MIB})
    sent = [json.dumps(CHAT | {"documents": f"{n}" * MIB}).encode() for n in range(8)]
    statuses: list[int] = []

    def ask(body: bytes) -> None:
        with gateway.client() as client:
            statuses.append(client.post("/v1/chat/completions", content=body).status_code)

    threads = [threading.Thread(target=ask, args=(body,)) for body in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8
    assert sorted(seen.body for seen in upstream.seen) == sorted(sent)
    gateway.until_idle()
    assert gateway.gateway.body_budget.reserved == 0
