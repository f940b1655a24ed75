"""A client that goes leaves nothing running."""

import time
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.support.replies import text_of

row = pytest.mark.conformance


@row("disconnect", "the client leaves a stream, or a plain request: the sequence is freed")
def test_disconnect(http: httpx.Client, model: str, ask: Callable) -> None:
    def running() -> float:
        lines = http.get(http.base_url.copy_with(path="/metrics")).text.splitlines()
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        ]
        if not values:
            pytest.skip("this URL gives no vLLM metrics")
        return sum(values)

    def wait_for(state: Callable[[float], bool], what: str) -> None:
        end = time.monotonic() + 60
        while not state(running()):
            assert time.monotonic() < end, what
            time.sleep(0.1)

    wait_for(lambda n: n == 0, "another request is still running")
    endless = {"max_tokens": 6000, "extra_body": {"ignore_eos": True}}
    stream = ask(**endless, stream=True)
    for _ in range(3):
        next(stream)
    assert running() == 1
    stream.close()
    wait_for(lambda n: n == 0, "the sequence runs on after the client has left its stream")
    with pytest.raises(openai.APITimeoutError):
        ask(**endless, timeout=2)
    wait_for(lambda n: n == 0, "the sequence runs on after the client has left its request")
    assert text_of(ask().choices[0])
