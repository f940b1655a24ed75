"""What the gateway adds to a request is what vLLM reads."""

import json
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from kimi_server.gateway.keys.cache_salt import cache_salt
from kimi_server.gateway.upstream.body import with_fields


def test_vllm_reads_the_headers_that_the_gateway_sets() -> None:
    serving = pytest.importorskip("vllm.entrypoints.generate.base.serving").GenerateBaseServing
    raw = Request({"type": "http", "headers": [(b"x-vllm-priority", b"1"), (b"x-data-parallel-rank", b"2")]})
    assert serving._get_priority(SimpleNamespace(priority=-9), raw) == 1
    assert serving._get_data_parallel_rank(raw) == 2


def test_vllm_takes_the_salt_that_was_added() -> None:
    """Of each kind of body that makes the engine read a prompt."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    message = [{"role": "user", "content": "x"}]
    salt = cache_salt(b"secret", "owner", "own")
    for kind, body in (
        (ChatCompletionRequest, {"messages": message}),
        (BatchChatCompletionRequest, {"messages": [message]}),
        (CompletionRequest, {"prompt": "x"}),
        (ResponsesRequest, {"input": "x"}),
        (AnthropicMessagesRequest, {"model": "m", "messages": message, "max_tokens": 1}),
        (StructuredDecisionRequest, {"state": "x", "questions": {}}),
    ):
        own = json.dumps(body | {"cache_salt": "own"}).encode()
        found = kind.model_validate(json.loads(with_fields(own, {"cache_salt": salt})))
        assert found.cache_salt == salt, kind
