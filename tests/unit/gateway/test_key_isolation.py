"""What one key may learn of another: nothing by hit times, stored responses or metrics."""

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_server.gateway.keys.cache_salt import cache_salt
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.upstream.body import with_fields
from tests.support.gateway import CHAT, Running, bearer
from tests.support.upstream import Upstream

SECRET = "a secret of enough letters"


def salt_of(gateway: Running, upstream: Upstream, name: str, path: str = "/v1/chat/completions", **more: Any) -> Any:
    """The salt that a replica gets with a request of this key."""
    with gateway.client(headers=bearer(name)) as client:
        assert client.post(path, json=CHAT | {"input": "x", "prompt": "x"} | more).status_code == 200
    return json.loads(upstream.seen[-1].body).get("cache_salt")


def test_owners_have_salts_of_their_own(start, keys_file) -> None:
    upstream = Upstream()
    people = {"alice": {"owner": "a"}, "anna": {"owner": "a"}, "bob": {}, "a": {}}
    gateway = start(upstream, keys=keys_file(**people))
    salts = {name: salt_of(gateway, upstream, name) for name in people}
    assert salts["alice"] == salts["anna"] == salts["a"] != salts["bob"]
    assert len(salts["bob"]) == 43
    assert salt_of(gateway, upstream, "bob") == salts["bob"]
    own = {name: salt_of(gateway, upstream, name, cache_salt="mine") for name in ("alice", "anna", "bob")}
    assert own["alice"] == own["anna"]
    assert len({"mine", *salts.values(), *own.values()}) == 5
    # Nobody reaches another's salt by giving it as an own.
    assert salt_of(gateway, upstream, "bob", cache_salt=salts["alice"]) not in salts.values()
    assert salt_of(gateway, upstream, "bob", cache_salt=None) == salts["bob"]


@pytest.mark.parametrize(
    ("people", "setting", "salted"),
    [
        ({"alice": {}}, None, False),
        ({"alice": {"owner": "a"}, "anna": {"owner": "a"}}, None, False),
        ({"alice": {}, "bob": {}}, None, True),
        ({"alice": {}, "bob": {}}, False, False),
        ({"alice": {}}, True, True),
    ],
)
def test_when_salts_are_given(start, keys_file, people: dict, setting: bool | None, salted: bool) -> None:
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(**people), cache_salt=setting)
    body = b'{"messages": [{"role":"user", "content":"Hello"}]} \n'
    with gateway.client(headers=bearer("alice")) as client:
        client.post("/v1/chat/completions", content=body)
        client.post("/v1/messages/count_tokens", content=body)
    first, second = (one.body for one in upstream.seen)
    assert second == body
    assert (first == body) is not salted
    assert ("cache_salt" in json.loads(first)) is salted


def test_without_keys_bytes_stay_as_they_are(start) -> None:
    upstream = Upstream()
    gateway = start(upstream)
    with gateway.client() as client:
        client.post("/v1/chat/completions", json=CHAT | {"cache_salt": "mine"})
    assert json.loads(upstream.seen[-1].body)["cache_salt"] == "mine"


@pytest.mark.parametrize("salt", ["", 3, ["x"], {}, False])
def test_a_salt_that_is_none_is_refused(start, keys_file, salt: Any) -> None:
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={"tokens_per_minute": 100}, bob={}))
    with gateway.client(headers=bearer("alice")) as client:
        reply = client.post("/v1/chat/completions", json=CHAT | {"cache_salt": salt})
    assert reply.status_code == 400
    assert gateway.gateway.keyring.limiters["alice"].tokens.used == 0
    assert "cache_salt" in reply.json()["error"]["message"]
    assert not upstream.seen


def test_salts_with_a_secret_are_the_same_everywhere(tmp_path: Path) -> None:
    def ring(secret: str | None) -> Keyring:
        path = tmp_path / "keys.yaml"
        given = {"cache_salt_secret": secret} if secret else {}
        path.write_text(json.dumps({"keys": [{"id": "a", "sha256": "0" * 64}], **given}))
        return Keyring(path)

    assert ring(SECRET).secret == ring(SECRET).secret != ring(SECRET + "x").secret
    assert ring(None).secret != ring(None).secret
    assert cache_salt(b"s", "a", "b") != cache_salt(b"s", "b", "a") != cache_salt(b"s", "b", None)
    assert SECRET not in repr(vars(ring(SECRET))["limiters"])


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"{}", {"cache_salt": "s"}),
        (b" { } \r\n\t", {"cache_salt": "s"}),
        (b'{"a":"}"}', {"a": "}", "cache_salt": "s"}),
        (b'{"cache_salt":"x","a":{"cache_salt":"y"},"cache_salt":"z"}', {"a": {"cache_salt": "y"}, "cache_salt": "s"}),
        ('{"a":"é}"}'.encode(), {"a": "é}", "cache_salt": "s"}),
    ],
)
def test_a_field_is_added_to_the_bytes(body: bytes, found: dict) -> None:
    salted = with_fields(body, {"cache_salt": "s"})
    assert json.loads(salted) == found
    assert salted.startswith(body.rstrip().removesuffix(b"}"))
    assert with_fields(body, {}) is body


def test_a_session_goes_on_where_its_owners_prefix_is(start, keys_file) -> None:
    upstreams = [Upstream() for _ in range(3)]
    gateway = start(*upstreams, keys=keys_file(alice={"owner": "a"}, anna={"owner": "a"}, bob={}))

    def homes(name: str) -> list[int]:
        found = []
        with gateway.client(headers=bearer(name)) as client:
            for number in range(12):
                chat = {"messages": [{"role": "user", "content": f"document {number}"}]}
                found.append(int(client.post("/v1/chat/completions", json=chat).headers["x-kimi-replica"]))
        return found

    first = homes("alice")
    assert set(first) == {0, 1, 2}
    assert homes("alice") == homes("anna") == first != homes("bob")


class Storing(Upstream):
    """Answers /v1/responses with an id, and any id that is asked for."""

    made = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == "/v1/responses":
            Storing.made += 1
        await super().__call__(scope, receive, send)

    async def answer(self, body: bytes, send) -> None:
        asked = json.loads(body) if body else {}
        found = {"id": asked.get("request_id", f"resp_{Storing.made}"), "text": '"resp_forged"', "echo": "resp_echo"}
        if not asked.get("stream"):
            return await self.reply(send, 200, json.dumps(found).encode())
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for kind in ("response.created", "response.completed"):
            event = f"event: {kind}\ndata: {json.dumps({'response': found, 'type': kind})}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_for_the_key_that_made_it(start, keys_file, stream: bool) -> None:
    upstreams = [Storing(), Storing()]
    gateway = start(*upstreams, keys=keys_file(alice={}, bob={}))
    with gateway.client() as client:

        def post(name: str, path: str = "", **more: Any) -> Any:
            body = None if path else {"input": "x", **more}
            return client.post(f"/v1/responses{path}", json=body, headers=bearer(name))

        made = post("alice", stream=stream)
        made_id = made.text.split('"id": "')[1].split('"')[0]
        assert client.get(f"/v1/responses/{made_id}", headers=bearer("alice")).status_code == 200
        assert post("alice", previous_response_id=made_id).headers["x-kimi-replica"] == made.headers["x-kimi-replica"]
        seen = sum(len(one.seen) for one in upstreams)
        answers = [
            (wanted, reply.status_code, reply.json()["error"]["message"].replace(wanted, "ID"))
            for wanted in (made_id, "resp_of_nobody", "resp_forged", "resp_echo")
            for reply in (
                client.get(f"/v1/responses/{wanted}", headers=bearer("bob")),
                post("bob", f"/{wanted}/cancel"),
                post("bob", previous_response_id=wanted),
            )
        ]
        assert {answer[1:] for answer in answers} == {(404, "Response with id 'ID' not found.")}
        assert sum(len(one.seen) for one in upstreams) == seen, "a replica was asked"
        assert post("alice", f"/{made_id}/cancel").status_code == 200


def test_nobody_names_a_response_himself(start, keys_file) -> None:
    upstream = Storing()
    gateway = start(upstream, keys=keys_file(alice={}, bob={}))
    with gateway.client() as client:
        body = {"input": "x"}
        theirs = client.post("/v1/responses", json=body, headers=bearer("alice")).json()["id"]
        body["request_id"] = theirs
        ours = client.post("/v1/responses", json=body, headers=bearer("bob")).json()["id"]
        assert ours != theirs
        assert client.get(f"/v1/responses/{theirs}", headers=bearer("bob")).status_code == 404
        assert client.get(f"/v1/responses/{ours}", headers=bearer("bob")).status_code == 200


def test_the_metrics_are_on_a_port_of_their_own(start, keys_file) -> None:
    gateway = start(Upstream(), keys=keys_file(alice={}))
    with gateway.client(headers=bearer("alice")) as client:
        client.post("/v1/chat/completions", json=CHAT)
        gateway.until_idle()
        assert client.get("/metrics").status_code == 404
        found = client.get(gateway.metrics_url, headers={"authorization": ""})
        assert 'kimi_gateway_prompt_tokens_total{key="alice"} 7.0' in found.text
        assert found.headers["content-type"].startswith("text/plain; version=")
        for other in ("/v1/models", "/", "/openapi.json", "/healthz"):
            assert client.get(gateway.metrics_url.replace("/metrics", other)).status_code == 404


def test_on_the_port_of_the_api_the_metrics_need_a_key_that_may(start, keys_file) -> None:
    gateway = start(Upstream(), keys=keys_file(alice={}, prometheus={"metrics": True}), metrics_port=None)
    with gateway.client() as client:
        for sent, status in (({}, 401), (bearer("eve"), 401), (bearer("alice"), 403), (bearer("prometheus"), 200)):
            reply = client.get("/metrics", headers=sent)
            assert reply.status_code == status
            assert ("kimi_gateway" in reply.text) is (status == 200)
            if status == 401:
                assert reply.headers["www-authenticate"] == "Bearer"
        assert "metrics: true" in client.get("/metrics", headers=bearer("alice")).json()["error"]["message"]


def test_without_keys_whoever_is_on_this_machine_reads_the_metrics(start) -> None:
    gateway = start(Upstream(), metrics_port=None)
    with gateway.client() as client:
        assert "kimi_gateway" in client.get("/metrics").text
