"""One request to the replicas: token accounting, admission, and the response relayed with its bytes unchanged.

It runs as a task that is cancelled when the client disconnects; that closes the connection to the replica, and vLLM
aborts the sequence. Another replica is tried only while no byte of a response has arrived.
"""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from kimi_server.gateway import headers
from kimi_server.gateway.access_log import AccessLogEntry
from kimi_server.gateway.admission import Grant
from kimi_server.gateway.errors import GatewayError, draining, error_body, no_replica
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.keys.cache_salt import cache_salt
from kimi_server.gateway.keys.limits import KeyLimiter, TokenCharge
from kimi_server.gateway.request.client import Client
from kimi_server.gateway.request.parsed_request import ParsedRequest, plain_prompt
from kimi_server.gateway.request.prompt_size import PromptSize
from kimi_server.gateway.routes import TOKENIZE, Route
from kimi_server.gateway.routing import replica_order, session_hash
from kimi_server.gateway.upstream.body import chunks, with_fields
from kimi_server.gateway.upstream.prefill import PARAMETERS
from kimi_server.gateway.upstream.replicas import Replica, ReplicaLost
from kimi_server.gateway.upstream.response import UpstreamResponse
from kimi_server.gateway.upstream.stored_responses import RESPONSES, StoredResponse, referred_to

PRIORITIES = {"short": 0, "long": 1}  # vLLM's --scheduling-policy priority serves the lower first


@dataclass
class UpstreamCall:
    """`run()` sends the request and relays the response. `parsed` is None on routes without a JSON body."""

    gateway: Gateway
    route: Route
    path: str
    entry: AccessLogEntry
    client: Client
    limiter: KeyLimiter
    body: bytes
    parsed: ParsedRequest | None
    prompt_tokens: int = field(init=False, default=0)  # as far as known; 0 where there is nothing to prefill
    charge: TokenCharge | None = field(init=False, default=None)
    sent: bool = field(init=False, default=False)  # to a replica that did not fail: it may have read the prompt
    response: UpstreamResponse | None = field(init=False, default=None)
    stored: StoredResponse | None = field(init=False, default=None)  # to which the request refers

    async def run(self) -> None:
        """Raises GatewayError, which it does only before a response has started."""
        self.stored = self._stored_response()
        if self.route.prefills and self.parsed is not None:
            fields = self._gateway_fields(self.parsed)
            await self._account(self.parsed)
            self.body = with_fields(self.body, fields)
        try:
            await self._try_replicas()
        finally:
            self._settle()

    async def _account(self, parsed: ParsedRequest) -> None:
        """Find the prompt's length, charge it to the key, and limit the output where the key's context does."""
        gateway, entry, limiter, route = self.gateway, self.entry, self.limiter, self.route
        # The replica puts what came before the new part of a conversation in front of it.
        size = parsed.size + PromptSize(token_ids=self.stored.tokens if self.stored else 0)
        session_id = self.client.header(b"x-session-id")
        entry.session = session_hash(session_id, limiter.key.cache_owner, parsed.prefix_hash)
        tokens = gateway.token_estimator.estimate(size)
        requested = any(parsed.fields.get(name) is not None for name in route.output_limit_fields)
        output = parsed.output_tokens(route.output_limit_fields, route.default_output_tokens)
        longest, left = limiter.key.longest_context, limiter.tokens_left
        prompt = tokens
        if longest is not None and output is None and 2 * size.max_tokens <= longest:
            prompt = size.max_tokens  # far from the limit the upper bound will do: the output gets a little less
        else:
            wanted = size.max_tokens + parsed.completions * (output or gateway.max_model_len or longest or 0)
            if (longest is not None and wanted > longest) or (left is not None and size.max_tokens > left):
                prompt = tokens = await self._count_tokens(size) or tokens
        limit = limiter.output_limit(prompt, output, parsed.completions, requested)
        if limit is not None and (output or not requested):  # what vLLM is to refuse stays as it is
            self.body = with_fields(self.body, dict.fromkeys(route.output_limit_fields[:1], limit))
        self.prompt_tokens = min(tokens, gateway.max_model_len or tokens)
        entry.prompt_tokens = self.prompt_tokens
        entry.lane = gateway.admission.lane_of(self.prompt_tokens)
        self.charge = limiter.charge(self.prompt_tokens)

    async def _count_tokens(self, size: PromptSize) -> int | None:
        """The prompt's tokens as a replica counts them; None where none is up or none can say."""
        gateway, path, body = self.gateway, self.route.tokenize_path, self.body
        order = replica_order(gateway.replicas.all, self.entry.session)
        if not order:
            return None
        if not size.text_bytes:
            return size.token_ids
        replica = gateway.replicas.all[order[0]]
        if path and (count := await gateway.token_counter.count(replica, path, body)):
            return count
        if not (plain := await gateway.body_parser.parse(plain_prompt, body)):
            return size.max_tokens
        count = await gateway.token_counter.count(replica, TOKENIZE, plain)
        return count and count + size.token_ids

    def _gateway_fields(self, parsed: ParsedRequest) -> dict[str, str]:
        """Fields that replace the client's own, which would affect other clients: cache_salt, request_id."""
        gateway, given, fields = self.gateway, parsed.fields, {}
        if given.get(PARAMETERS) is not None:  # it names hosts that a replica connects to
            raise GatewayError(400, "invalid_request", f"{PARAMETERS} is set by the gateway: leave it out.")
        if gateway.uses_cache_salts:
            secret, owner = gateway.keyring.secret, self.limiter.key.cache_owner
            fields["cache_salt"] = cache_salt(secret, owner, given.get("cache_salt"))
        if self.route.path == RESPONSES and "request_id" in given:
            fields["request_id"] = f"resp_{secrets.token_hex(16)}"
        return fields

    def _stored_response(self) -> StoredResponse | None:
        """The response to which this request refers, if it refers to one.

        Raises GatewayError 404 for one of another key, exactly as for one that does not exist.
        """
        response_id = referred_to(self.path, self.parsed.fields if self.parsed else None)
        stored = self.gateway.stored_responses.find(self.limiter.key.id, response_id)
        if stored is None and isinstance(response_id, str) and self.gateway.keyring.path is not None:
            raise GatewayError(404, "no_response", f"Response with id {response_id[:128]!r} not found.")
        return stored

    async def _try_replicas(self) -> None:
        """Send the request; where a replica fails before it responds, send it to another."""
        gateway, replicas = self.gateway, self.gateway.replicas
        failed: frozenset[int] = frozenset()
        reached = False
        while True:
            grant = await self._admit(failed)
            try:
                return await self._send(grant)
            except ReplicaLost as lost:
                self.sent = False
                if gateway.client.is_closed:  # by the drain: the replica did not fail
                    raise draining() from None
                # The replica may have closed this connection alone: a probe tells.
                await replicas.probe(gateway.client, lost.replica)
                # A request that reached a replica may have crashed it: it gets one more replica, not all of them.
                if (lost.reached and reached) or lost.replica.index in failed:
                    message = f"The replica failed before it answered: {lost}."
                    raise GatewayError(502, "replica_lost", message, 1) from None
                reached |= lost.reached
                failed |= {lost.replica.index}
            finally:
                grant.release()

    async def _admit(self, failed: frozenset[int]) -> Grant:
        """Wait for admission to a replica, if possible not one of `failed`. Without a prompt there is no wait."""
        gateway, entry = self.gateway, self.entry
        home = self.stored.replica if self.stored else None

        def candidates() -> list[int]:
            order = replica_order(gateway.replicas.all, entry.session, failed)
            return [home] if home in order else order  # elsewhere it is not known

        if self.prompt_tokens == 0:
            if not (order := candidates()):
                raise no_replica()
            return Grant(order[0], "short", 0, 0.0, False, 0, lambda grant: None)
        begun = time.monotonic()
        try:
            grant = await gateway.admission.enter(self.limiter.key.id, self.prompt_tokens, candidates)
        finally:
            entry.queue_seconds = (entry.queue_seconds or 0.0) + time.monotonic() - begun
        gateway.metrics.queue_seconds.labels(grant.lane).observe(grant.waited)
        if grant.affinity_miss and entry.session is not None:
            gateway.metrics.affinity_misses.inc()
        return grant

    async def _send(self, grant: Grant) -> None:
        """Send the request to the granted replica and relay the response.

        Raises ReplicaLost or GatewayError before the response has started; afterwards a failure ends the response.
        """
        gateway = self.gateway
        replica = gateway.replicas.all[grant.replica]
        self.entry.replica, self.entry.reading, self.entry.running = replica.index, grant.reading, replica.running
        one = self.parsed is not None and self.parsed.completions == 1  # vLLM hands a prompt to one sequence
        read = await gateway.prefill.read(self.route, self.body, self.entry) if one else {}
        if gateway.client.is_closed:
            raise draining()
        with replica.track_request():
            try:
                self.sent = True
                response = await gateway.client.send(self._request(replica, grant, read), stream=True)
                try:
                    if response.status_code == 401:  # about the gateway's key for the replica, not the client's
                        self.sent = False
                        raise GatewayError(502, "replica_key", "The replica refuses the gateway's own key.")
                    await self._relay(replica, grant, response)
                finally:
                    await response.aclose()
            except httpx.ReadTimeout as error:
                if self.client.response_started:
                    await self._break_off(replica, error)
                else:
                    self.sent = False
                    seconds = gateway.settings.limits.replica_seconds
                    message = f"The replica sent nothing for {seconds:g} seconds."
                    raise GatewayError(504, "replica_silent", message) from None
            except httpx.LocalProtocolError as error:
                self.sent = False
                raise GatewayError(400, "header", f"A header of the request cannot be passed on: {error}.") from None
            except httpx.TransportError as error:
                if not self.client.response_started:
                    raise ReplicaLost(replica, error) from error
                await self._break_off(replica, error)

    def _request(self, replica: Replica, grant: Grant, fields: dict[str, Any]) -> httpx.Request:
        """The client's request for this replica with more `fields`, without the HTTP client's default headers."""
        if self.route.priority_in_body:
            fields = {**fields, "priority": PRIORITIES[grant.lane]}
        body = with_fields(self.body, fields)
        added = {"x-request-id": self.entry.request_id, **replica.headers}
        if body:
            added["content-length"] = str(len(body))
        if self.route.prefills:
            added["x-vllm-priority"] = str(PRIORITIES[grant.lane])
        if replica.rank is not None:
            added["x-data-parallel-rank"] = str(replica.rank)
        target = self.path.encode() + (b"?" + self.client.query if self.client.query else b"")
        return httpx.Request(
            self.route.method,
            replica.url_for(target),
            headers=[*headers.to_replica(self.client.headers), *headers.encode(added)],
            content=chunks(body) if body else None,
            extensions={"timeout": self.gateway.timeout.as_dict()},
        )

    async def _relay(self, replica: Replica, grant: Grant, upstream: httpx.Response) -> None:
        """Relay the response. Its header waits for the first byte: until then another replica can be tried."""
        response = self.response = UpstreamResponse(upstream.headers.get("content-type", ""))
        self.entry.replied(upstream.status_code)

        async def start() -> None:
            if not self.client.response_started:
                self.body = b""  # it will not be sent again
                self.client.release_body()
                status, fields = upstream.status_code, upstream.headers.raw
                added = headers.encode(headers.of_gateway(self.entry, self.limiter, self.gateway.draining))
                await self.client.start(status, [*headers.to_client(status, fields), *added])

        async for chunk in upstream.aiter_raw():
            ready = response.feed(chunk)
            # What is asked for again holds parts of an answer, which may look like another's id.
            response_id = response.response_id if self.path == RESPONSES else referred_to(self.path, None)
            if response_id and upstream.status_code == 200:  # before the client has the id or the end, and refers to it
                known = self.gateway.stored_responses
                known.remember(self.limiter.key.id, response_id, replica.index, response.usage.tokens)
            if response.first_token and grant.held:
                grant.release()
                if upstream.status_code == 200 and self.prompt_tokens:
                    self.entry.ttft = time.monotonic() - self.entry.started_at
            if ready:
                await start()
                await self.client.write(ready)
        rest = response.finish()
        await start()
        await self.client.write(rest, more=False)

    async def _break_off(self, replica: Replica, error: Exception) -> None:
        """End a response whose replica failed: a stream with an error event, any other by closing the connection."""
        reason = str(error) or type(error).__name__
        self.entry.error = "replica_lost"
        if self.gateway.draining:
            message = "The gateway stopped before this answer was complete."
        else:
            message = f"The replica was lost before this answer was complete: {reason}."
            replica.probe_requested.set()
        if self.response is not None and self.response.is_stream:
            event = json.dumps({"type": "error", **error_body(502, message)})
            name = "event: error\n" if self.route.anthropic else ""
            await self.client.write(f"{name}data: {event}\n\n".encode(), more=False)

    def _settle(self) -> None:
        """Learn from the usage that the replica reports, and replace the key's charge by it."""
        if self.parsed is None or self.charge is None:
            return
        response, entry = self.response, self.entry
        if response and (prompt := response.usage.prompt_tokens) is not None:
            if not self.parsed.fields.get("previous_response_id"):  # of what came before no bytes were seen
                self.gateway.token_estimator.observe(self.parsed.size, prompt)
            self.charge.settle(prompt + response.completion_tokens)
            entry.report_usage(prompt, response.usage.cached_tokens, response.usage.completion_tokens)
        elif self.sent and (response is None or entry.status == 200):
            # No usage (the client left, or asked for none), but the prompt may have been computed.
            self.charge.settle(self.prompt_tokens + (response.completion_tokens if response else 0))
        else:
            self.charge.settle(0)
