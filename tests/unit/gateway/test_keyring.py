"""Who gets in, and what a change of the file of keys does."""

import hmac
import logging

import pytest

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.keys import keyring
from kimi_server.gateway.keys.keyring import Keyring
from tests.support.gateway import bearer
from tests.support.upstream import Upstream

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def test_who_gets_in(start, keys_file) -> None:
    upstream = Upstream()
    gateway = start(upstream, keys=keys_file(alice={}, bob={}))
    with gateway.client() as client:
        for sent in ({}, bearer("eve"), {"authorization": "Basic sk-alice"}, {"authorization": "Bearer"}):
            reply = client.post("/v1/chat/completions", json=CHAT, headers=sent)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "eve" not in reply.text
        assert not upstream.seen
        for sent in (bearer("alice"), {"x-api-key": "sk-bob"}):
            assert client.post("/v1/chat/completions", json=CHAT, headers=sent).status_code == 200
    gateway.until_idle()
    assert [line["key"] for line in gateway.lines] == [None] * 4 + ["alice", "bob"]
    assert gateway.metric("prompt_tokens_total", key="alice") == upstream.prompt_tokens
    assert gateway.metric("completion_tokens_total", key="bob") == upstream.tokens
    assert gateway.metric("cached_tokens_total", key="bob") == 3
    assert gateway.metric("rejected_total", reason="unknown_key") == 2


def test_every_key_is_compared_in_constant_time(keys_file, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(keys_file(a={}, b={}, c={}))
    compared: list[str] = []
    equal = hmac.compare_digest

    def compare(left: str, right: str) -> bool:
        compared.append(right)
        return equal(left, right)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert ring.authenticate("sk-a").key.id == "a"
    assert len(compared) == 3


def test_a_reload_keeps_what_was_used(keys_file, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(alice={"requests_per_minute": 1}, bob={})
    ring = Keyring(path)
    with ring.authenticate("sk-alice").request():
        pass
    keys_file(alice={"requests_per_minute": 1, "concurrency": 3}, carol={})
    with caplog.at_level(logging.INFO, "kimi_server"):
        ring.reload()
    assert [record.levelname for record in caplog.records] == ["INFO"], "a change that was asked for needs nobody"
    assert ring.authenticate("sk-carol").key.id == "carol"
    with pytest.raises(GatewayError):
        ring.authenticate("sk-bob")
    alice = ring.authenticate("sk-alice")
    assert alice.key.concurrency == 3
    with pytest.raises(GatewayError), alice.request():
        pass


@pytest.mark.parametrize("text", ["keys: [", "keys: []", "keys: [{id: x, sha256: short}]", None])
def test_a_broken_reload_keeps_the_keys(keys_file, caplog: pytest.LogCaptureFixture, text: str | None) -> None:
    path = keys_file(alice={})
    ring = Keyring(path)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with caplog.at_level(logging.WARNING, "kimi_server"):
        ring.reload()
        ring.reload()
    assert ring.authenticate("sk-alice").key.id == "alice"
    assert len(caplog.records) == 1
    assert str(path) in caplog.records[0].getMessage()


def test_a_running_gateway_sees_the_change(start, keys_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "RELOAD_SECONDS", 0.05)
    gateway = start(Upstream(), keys=keys_file(alice={}))
    with gateway.client(headers=bearer("bob")) as client:
        assert client.get("/v1/models").status_code == 401
        keys_file(alice={}, bob={})
        gateway.until(lambda: client.get("/v1/models").status_code == 200, "bob gets in")


def test_without_a_file_there_is_one_key_without_limits() -> None:
    ring = Keyring(None)
    assert ring.authenticate(None) is ring.authenticate("anything")
