"""LoRA on a GPU, in bfloat16: as near to the fp32 reference with the adapter merged as transformers in bf16 is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kimi_demo.server import Server
from tests.e2e.vllm.test_adapters import LORA, Adapters, ask, flags_of, modules_alone, modules_together
from tests.e2e.vllm.test_gpu import FLAGS, NGRAM
from tests.support import adapters
from tests.support.completions import Answer, Completions
from tests.support.judge import TOKENS, Judge, Seen
from tests.support.prompts import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WAYS = {
    "graphs": ("--enable-prefix-caching",),
    "eager": ("--enforce-eager", "--no-enable-prefix-caching"),
    "drafts": (NGRAM, "--enable-prefix-caching"),
    "two ranks": ("--tensor-parallel-size=2", "--enable-prefix-caching"),
}


@pytest.fixture(scope="module")
def judge(demo_model: Path) -> Judge:
    return Judge(demo_model)


def check(judge: Judge, known: Adapters, asked: list[tuple[str | None, list[int]]], answers: list[Answer]) -> None:
    """All adapters together: of one alone there are too few tokens for a ratio to say anything."""
    seen = Seen()
    for name, folder in known.items():
        judge.scores.clear()  # of another adapter
        with adapters.merged(judge.reference.model, folder), adapters.merged(judge.rough.model, folder):
            own = [(one[1], answer) for one, answer in zip(asked, answers, strict=True) if one[0] == name]
            found = judge.compare([(prompt, TOKENS) for prompt, _ in own], [answer for _, answer in own])
        print(name, found)
        seen += found
    print(seen.check())


@pytest.mark.parametrize("way", WAYS)
def test_every_way(
    way: str, judge: Judge, vocab: int, servers: Callable[..., Server], demo_model: Path, tmp_path: Path
) -> None:
    if way == "two ranks" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    known = modules_together(judge.reference.model, tmp_path)
    server = Completions(servers(demo_model, *FLAGS, *LORA, "--max-loras=2", *flags_of(known), *WAYS[way]))
    stream = Stream(vocab, seed=29)
    asked = [(name, stream.prompt(-(-length // 2)) * 2) for length in (2, 30, 130, 600, 1500) for name in known]
    for _ in range(2):  # the second time from the prefix cache
        check(judge, known, asked, ask(server, asked, TOKENS))


def test_each_module_alone(
    judge: Judge, vocab: int, servers: Callable[..., Server], demo_model: Path, tmp_path: Path
) -> None:
    """Each large enough that one who ignored it would answer otherwise."""
    known = modules_alone(judge.reference.model, tmp_path)
    server = Completions(servers(demo_model, *FLAGS, *LORA, "--max-loras=4", "--max-cpu-loras=20", *flags_of(known)))
    stream = Stream(vocab, seed=30)
    prompts = [stream.prompt(70) for _ in range(4)]
    asked = [(name, prompt) for prompt in prompts for name in known]
    answers = ask(server, asked, TOKENS)
    own = {tuple(prompt): answer.tokens for (name, prompt), answer in zip(asked, answers, strict=True) if name is None}
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert name is None or answer.tokens != own[tuple(prompt)]
    check(judge, known, asked, answers)
