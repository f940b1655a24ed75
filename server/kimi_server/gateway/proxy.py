"""One request on its way: body in, admission, to a replica, answer out with its bytes unchanged.

When the client leaves, whatever is being done for it is cancelled; that closes the connection to the replica, and vLLM
aborts the sequence. A request is sent again only while no byte of an answer has come.
"""

import json
import secrets
import time

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_server.gateway import access_log, headers
from kimi_server.gateway.admission import Grant
from kimi_server.gateway.errors import Refusal, error_body, no_replica, stopping
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.keys.cache_salt import cache_salt
from kimi_server.gateway.keys.limits import Account, Charge
from kimi_server.gateway.request.body_budget import pieces, with_fields
from kimi_server.gateway.request.client import Client, ClientLeft
from kimi_server.gateway.request.parsed_request import Question, plain_prompt, read_question
from kimi_server.gateway.request.prompt_size import Size
from kimi_server.gateway.routes import TOKENIZE, Route
from kimi_server.gateway.routing import session_of
from kimi_server.gateway.upstream.replicas import Replica
from kimi_server.gateway.upstream.response import Answer

RESPONSES = "/v1/responses"
PRIORITIES = {"short": "0", "long": "1"}  # vLLM's --scheduling-policy priority serves the lower first


class ReplicaLost(Exception):
    """The connection to a replica failed before a byte of its answer. `reached`: it may have seen the request."""

    def __init__(self, replica: Replica, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.replica = replica
        self.reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


class Exchange(Response):
    """A response that reads its request itself, so that no body is taken in before it is known to be wanted."""

    def __init__(self, gateway: Gateway, route: Route, path: str) -> None:
        self.gateway, self.route, self.path = gateway, route, path
        self.entry = access_log.Entry(f"req-{secrets.token_hex(12)}", route.path, time.monotonic())
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send, self.gateway.settings.limits)
        with self.gateway.exchange():
            try:
                await self._handle(client)
            except Refusal as refusal:
                await self._refuse(client, refusal)
            except ClientLeft:
                self.entry.leave()
            finally:
                self.gateway.record(self.entry)

    async def _handle(self, client: Client) -> None:
        gateway = self.gateway
        if gateway.draining:
            raise stopping()
        account = gateway.keyring.find(client.key)
        self.entry.key = account.key.id or None
        with account.request():
            client.check()
            try:
                body = await client.read_body(gateway.bodies)
                question = await gateway.reader.read(read_question, body) if self.route.json_body else None
                await client.stays_for(Passage(self, client, account, body, question).run())
            finally:
                client.release_body()

    async def _refuse(self, client: Client, refusal: Refusal) -> None:
        """Answer with an error; where an answer has begun there is nothing left to say but its end."""
        self.entry.refuse(refusal.status, refusal.reason)
        try:
            added = self.extra_headers(client.body_read)
            await client.start(refusal.status, [*encoded(refusal.headers), *encoded(added)])
            await client.write(refusal.body, more=False)
        except ClientLeft:
            self.entry.leave()

    def extra_headers(self, body_read: bool = True) -> dict[str, str]:
        """What the gateway adds to any answer."""
        entry = self.entry
        found = {"x-request-id": entry.id}
        if entry.wait is not None:
            found["x-kimi-queue-seconds"] = f"{entry.wait:.4f}"
        if entry.replica is not None:
            found["x-kimi-replica"] = str(entry.replica)
        if entry.lane is not None:
            found["x-kimi-lane"] = entry.lane
        if self.gateway.draining or not body_read:
            # The rest of a body that was not wanted may be on its way: it must not be read as a request.
            found["connection"] = "close"
        return found


def encoded(fields: dict[str, str]) -> headers.Headers:
    return [(name.encode(), value.encode()) for name, value in fields.items()]


class Passage:
    """A request whose body is here, until the last byte of its answer."""

    def __init__(
        self, exchange: Exchange, client: Client, account: Account, body: bytes, question: Question | None
    ) -> None:
        self.exchange, self.client, self.account = exchange, client, account
        self.gateway, self.route, self.entry = exchange.gateway, exchange.route, exchange.entry
        self.body, self.question = body, question
        self.tokens = 0  # of the prompt, as far as is known; 0 where there is nothing to prefill
        self.charge: Charge | None = None
        self.sent = False  # to a replica that did not fail: it may have read the prompt
        self.answer: Answer | None = None
        self.home: int | None = None  # the replica that holds what it refers to

    async def run(self) -> None:
        """Raises Refusal where no answer has begun."""
        self.home = self._home()
        if self.route.prefills and self.question is not None:
            added = self._added(self.question)
            await self._weigh(self.question)
            self.body = with_fields(self.body, added)
        try:
            await self._try_replicas()
        finally:
            self._settle()

    async def _weigh(self, question: Question) -> None:
        """Find how long the prompt is, take it off the key's allowance, and bound the answer where the key does."""
        gateway, entry, account, route, size = self.gateway, self.entry, self.account, self.route, question.size
        entry.session = session_of(self.client.header(b"x-session-id"), account.key.belongs_to, question.opening)
        tokens = gateway.estimator.tokens_of(size)
        given = any(name in question.body for name in route.answer_fields)
        answer = question.answer(route.answer_fields, route.answer)
        longest, left = account.key.longest_context, account.tokens_left
        prompt = tokens
        if longest is not None and answer is None and 2 * size.most <= longest:
            prompt = size.most  # far from the limit, where an answer may as well be a little shorter
        else:
            wanted = size.most + question.answers * (answer or gateway.max_model_len or longest or 0)
            if (longest is not None and wanted > longest) or (left is not None and size.most > left):
                prompt = tokens = await self._count(size) or tokens
        limit = account.answer_limit(prompt, answer, question.answers, given)
        if limit is not None:
            self.body = with_fields(self.body, dict.fromkeys(route.answer_fields[:1], limit))
        self.tokens = min(tokens, gateway.max_model_len or tokens)
        entry.tokens = self.tokens
        entry.lane = gateway.admission.lane_of(self.tokens)
        self.charge = account.charge(self.tokens)

    async def _count(self, size: Size) -> int | None:
        """The prompt's tokens as a replica counts them; None where none can tell."""
        gateway, path, body = self.gateway, self.route.counts, self.body
        order = gateway.replicas.order(self.entry.session)
        if not order:
            return None
        if not size.text:
            return size.ids
        replica = gateway.replicas.all[order[0]]
        if path and (count := await gateway.counts.ask(replica, path, body)):
            return count
        plain = await gateway.reader.read(plain_prompt, body)
        return await gateway.counts.ask(replica, TOKENIZE, plain) if plain else size.most

    def _added(self, question: Question) -> dict[str, str]:
        """What a body gets in place of the client's own, for it decides about others: the cache's salt, an id."""
        gateway, body, fields = self.gateway, question.body, {}
        if gateway.salts:
            secret, owner = gateway.keyring.secret, self.account.key.belongs_to
            fields["cache_salt"] = cache_salt(secret, owner, body.get("cache_salt"))
        if self.route.path == RESPONSES and "request_id" in body:
            fields["request_id"] = f"resp_{secrets.token_hex(16)}"
        return fields

    async def _try_replicas(self) -> None:
        """Pass the request on, to another replica where one fails before it answers."""
        gateway, replicas = self.gateway, self.gateway.replicas
        failed: frozenset[int] = frozenset()
        reached = False
        while True:
            grant = await self._enter(failed)
            try:
                return await self._forward(grant)
            except ReplicaLost as lost:
                self.sent = False
                if gateway.client.is_closed:  # it was not the replica that went
                    raise stopping() from None
                # A kept connection may have been closed in the moment of its use: only a probe tells what is down.
                await replicas.probe(gateway.client, lost.replica)
                # A request that reached a replica may be what brought it down: it gets one more, not all of them.
                if (lost.reached and reached) or lost.replica.index in failed:
                    raise Refusal(502, "replica_lost", f"The replica failed before it answered: {lost}.", 1) from None
                reached |= lost.reached
                failed |= {lost.replica.index}
            finally:
                grant.release()

    async def _enter(self, failed: frozenset[int]) -> Grant:
        """Leave to send the request to some replica; what prefills nothing never waits for it."""
        gateway, entry = self.gateway, self.entry

        def candidates() -> list[int]:
            order = gateway.replicas.order(entry.session, failed)
            return sorted(order, key=lambda index: index != self.home)

        if self.tokens == 0:
            if not (order := candidates()):
                raise no_replica()
            return Grant(order[0], "short", 0, 0.0, False, lambda grant: None)
        begun = time.monotonic()
        try:
            grant = await gateway.admission.enter(self.account.key.id, self.tokens, candidates)
        finally:
            entry.wait = (entry.wait or 0.0) + time.monotonic() - begun
        gateway.metrics.queue.labels(grant.lane).observe(grant.waited)
        if grant.spilled and entry.session is not None:
            gateway.metrics.spilled.inc()
        return grant

    def _home(self) -> int | None:
        """The replica that holds the earlier response that this request is about, if any.

        Raises Refusal where that is not of this key; of one that nobody made the answer is the same.
        """
        if self.question is not None:
            asked = self.question.body.get("previous_response_id") if self.route.path == RESPONSES else None
        elif self.route.path.startswith(f"{RESPONSES}/"):
            asked = self.exchange.path.removeprefix(f"{RESPONSES}/").removesuffix("/cancel")
        else:
            asked = None
        home = self.gateway.stored.replica_of(self.account.key.id, asked)
        if home is None and isinstance(asked, str) and self.gateway.keyring.path is not None:
            raise Refusal(404, "no_response", f"Response with id {asked[:128]!r} not found.")
        return home

    async def _forward(self, grant: Grant) -> None:
        gateway = self.gateway
        replica = gateway.replicas.all[grant.replica]
        self.entry.replica = replica.index
        if gateway.client.is_closed:
            raise stopping()
        with replica.busy():
            try:
                self.sent = True
                response = await gateway.client.send(self._request(replica, grant), stream=True)
                try:
                    if response.status_code == 401:  # of the gateway's key, which is not the client's affair
                        raise Refusal(502, "replica_key", "The replica refuses the gateway's own key.")
                    await self._relay(replica, grant, response)
                finally:
                    await response.aclose()
            except httpx.ReadTimeout as error:
                if self.client.started:
                    await self._break_off(replica, error)
                else:
                    self.sent = False
                    seconds = gateway.settings.limits.replica_seconds
                    message = f"The replica gave no sign for {seconds:g} seconds."
                    raise Refusal(504, "replica_silent", message) from None
            except httpx.TransportError as error:
                if not self.client.started:
                    raise ReplicaLost(replica, error) from error
                await self._break_off(replica, error)

    def _request(self, replica: Replica, grant: Grant) -> httpx.Request:
        """Without the defaults of the HTTP client: the bytes are asked for as the client of ours asked."""
        added = {"x-request-id": self.entry.id, **replica.headers}
        if self.body:
            added["content-length"] = str(len(self.body))
        if self.route.prefills:
            added["x-vllm-priority"] = PRIORITIES[grant.lane]
        if replica.rank is not None:
            added["x-data-parallel-rank"] = str(replica.rank)
        target = self.exchange.path.encode() + (b"?" + self.client.query if self.client.query else b"")
        return httpx.Request(
            self.route.method,
            replica.at(target),
            headers=[*headers.to_replica(self.client.headers), *encoded(added)],
            content=pieces(self.body) if self.body else None,
            extensions={"timeout": self.gateway.timeout.as_dict()},
        )

    async def _relay(self, replica: Replica, grant: Grant, response: httpx.Response) -> None:
        """The answer to the client, its head only with the first byte: until then another replica may be asked."""
        answer = self.answer = Answer(response.headers.get("content-type", ""))
        self.entry.status = response.status_code

        async def head() -> None:
            if not self.client.started:
                self.body = b""  # nobody else will be asked
                self.client.release_body()
                added = encoded(self.exchange.extra_headers())
                await self.client.start(response.status_code, [*headers.to_client(response.headers.raw), *added])

        async for chunk in response.aiter_raw():
            ready = answer.feed(chunk)
            if self.route.path == RESPONSES and response.status_code == 200 and answer.response_id:
                # Before the client has it, and may ask for it.
                self.gateway.stored.remember(self.account.key.id, answer.response_id, replica.index)
            if answer.began and grant.held:
                grant.release()
                if response.status_code == 200 and self.tokens:
                    self.entry.ttft = time.monotonic() - self.entry.began
            if ready:
                await head()
                await self.client.write(ready)
        rest = answer.finish()
        await head()
        await self.client.write(rest, more=False)

    async def _break_off(self, replica: Replica, error: Exception) -> None:
        """End an answer whose replica went: a stream with an error event, any other with a connection cut short."""
        why = str(error) or type(error).__name__
        self.entry.error = "replica_lost"
        if self.gateway.draining:
            message = "The gateway stopped before this answer was complete."
        else:
            message = f"The replica was lost before this answer was complete: {why}."
            replica.doubted.set()
        if self.answer is not None and self.answer.streams:
            event = json.dumps({"type": "error", **error_body(502, message)})
            name = "event: error\n" if self.route.anthropic else ""
            await self.client.write(f"{name}data: {event}\n\n".encode(), more=False)

    def _settle(self) -> None:
        """Learn from what the replica counted, and correct the key's charge by it."""
        if self.question is None or self.charge is None:
            return
        answer, entry = self.answer, self.entry
        if answer and answer.usage.prompt is not None:
            self.gateway.estimator.correct(self.question.size, answer.usage.prompt)
            self.charge.settle(answer.usage.prompt + answer.completion)
            entry.count(answer.usage.prompt, answer.usage.cached, answer.usage.completion)
        elif self.sent and (answer is None or entry.status == 200):
            # Nothing was counted, but what was let in may have been read: the client left, or did not want to know.
            self.charge.settle(self.tokens + (answer.completion if answer else 0))
        else:
            self.charge.settle(0)
