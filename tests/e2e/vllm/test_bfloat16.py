"""In bfloat16 the server is as near to the fp32 reference as transformers in bfloat16 is, reading and writing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.support.completions import Completions
from tests.support.prompts import Stream

BFLOAT16_FLAGS = (
    "--dtype=bfloat16",
    "--max-model-len=8192",
    "--kv-cache-memory-bytes=1G",
    "--max-num-batched-tokens=1024",
    "--no-enable-prefix-caching",
    "--max-logprobs=-1",
    # On a GPU so much must be free at the start, whatever is taken; other servers may be there.
    *(["--gpu-memory-utilization=0.1"] if torch.cuda.is_available() else []),
)
RATIO = 1.2
SEQUENCES, LENGTH, PROMPT = 4, 256, 64


@pytest.fixture(params=["as it is", "without AVX-512"])
def bfloat16_server(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    if request.param == "as it is":
        return Completions(servers(demo_model, *BFLOAT16_FLAGS))
    if torch.cuda.is_available() or not torch.cpu._is_avx512_supported():
        pytest.skip("this machine serves on a GPU, or as it is without AVX-512")
    server = servers(demo_model, *BFLOAT16_FLAGS, env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert "Weights in bfloat16 are multiplied by the C kernels" in server.log
    return Completions(server)


@pytest.fixture(scope="module")
def bfloat16_reference(reference: HfReference) -> HfReference:
    return HfReference(reference.path, torch.bfloat16)


def divergence(expected: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(expected || logprobs) of each row, in nats; both [T, vocab]."""
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(len(logprobs)), atol=1e-2)
    return (expected.exp() * (expected - logprobs)).sum(-1)


def table(rows: list[dict[str, Any]], vocab: int) -> torch.Tensor:
    """[{token id: logprob}] -> [T, vocab]; fails if a token is missing."""
    logprobs = torch.full((len(rows), vocab), float("nan"))
    for row, found in zip(logprobs, rows, strict=True):
        row[torch.tensor([int(token) for token in found])] = torch.tensor(list(found.values()))
    assert not logprobs.isnan().any()
    return logprobs


def read(server: Completions, ids: list[int], vocab: int) -> tuple[list[int], int, torch.Tensor]:
    """The server's distribution after each token of a prompt, from the prefill path."""
    choice = server.post(server.body(ids, 1, prompt_logprobs=vocab))["choices"][0]
    rows = [{token: value["logprob"] for token, value in row.items()} for row in choice["prompt_logprobs"][1:]]
    return ids, 0, table(rows, vocab)


def written(server: Completions, ids: list[int], vocab: int) -> tuple[list[int], int, torch.Tensor]:
    """The server's distributions while it writes an answer, from the decode path."""
    prompt = ids[:PROMPT]
    more = {"logprobs": vocab, "return_tokens_as_token_ids": True}
    choice = server.post(server.body(prompt, LENGTH - PROMPT) | more)["choices"][0]
    rows = [
        {token.removeprefix("token_id:"): value for token, value in row.items()}
        for row in choice["logprobs"]["top_logprobs"]
    ]
    return prompt + choice["token_ids"], PROMPT - 1, table(rows, vocab)


@pytest.mark.parametrize("way", [read, written])
def test_divergence_from_fp32(
    way: Callable[..., tuple[list[int], int, torch.Tensor]],
    bfloat16_server: Completions,
    bfloat16_reference: HfReference,
    reference: HfReference,
    vocab: int,
):
    stream = Stream(vocab, seed=3)
    ours, theirs = [], []
    for _ in range(SEQUENCES):
        ids, first, logprobs = way(bfloat16_server, stream.prompt(LENGTH), vocab)
        expected = reference.logits(ids)[first:-1].log_softmax(-1)
        ours.append(divergence(expected, logprobs))
        theirs.append(divergence(expected, bfloat16_reference.logits(ids)[first:-1].log_softmax(-1)))
    our_mean, their_mean = torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
    print(f"mean KL: server {our_mean:.4f}, transformers {their_mean:.4f}, ratio {our_mean / their_mean:.3f}")
    assert 0 < our_mean <= RATIO * their_mean
