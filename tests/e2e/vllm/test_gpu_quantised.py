"""Quantised weights on a GPU: as near to the fp32 reference on what they stand for as transformers in bfloat16 is."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.demo_model.conversations import KINDS, Asker, make_log
from kimi_demo.server import Server
from kimi_demo.subject import TRAINED
from tests.e2e.vllm.test_gpu import CHUNKS, FLAGS, NGRAM
from tests.support import quantized_checkpoint
from tests.support.completions import Completions
from tests.support.judge import Judge, draw
from tests.support.logs import ask_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# What a norm, a convolution, an embedding, the router and the heads' gates have is no product of these.
PRODUCTS = r"(?<!embed_tokens)(_proj|with_mqa)(\.weight)?$"
BY_TOKEN, BY_GROUP = (PRODUCTS, None), (rf"mlp\..*{PRODUCTS}", 128)
# Checkpoint -> (groups, what is left out), and the products whose inputs it has rounded to fp8.
CHECKPOINTS: dict[str, tuple[dict[str, tuple[str, list[str]]], list[str] | None, tuple[str, int | None] | None]] = {
    "fp8 by channel": ({"group_0": ("fp8 by channel", ["Linear"])}, None, BY_TOKEN),
    "fp8 by block": ({"group_0": ("fp8 by block", ["Linear"])}, ["lm_head", "re:.*self_attn.*"], BY_GROUP),
    "int4 experts": ({"group_0": ("int4, groups of 32", ["Linear"])}, quantized_checkpoint.EXPERTS_ALONE, None),
    "int4": ({"group_0": ("int4, groups of 32", ["Linear"])}, ["lm_head", "re:.*(b|f_a|g_a|f_b|g_b)_proj"], None),
    "several ways": (
        {
            "group_0": ("fp8 by channel", [r"re:.*self_attn\.(q|k|b|f_a)_proj.*", r"re:.*down_proj"]),
            "group_1": ("int4, groups of 32", [r"re:.*experts\.\d+\..*", r"re:.*o_proj", r"re:.*up_proj"]),
        },
        [],
        (r"mlp\.(shared_experts\.)?down_proj", None),
    ),
}


# Flags that every checkpoint is served with, and those for two of them alone.
STORED_WAYS = {
    "one rank": (),
    "two ranks": ("--tensor-parallel-size=2",),
    "drafts, chunks, bfloat16 state": (NGRAM, *CHUNKS, "--mamba-ssm-cache-dtype=bfloat16"),
    "short of blocks": (*CHUNKS, "--max-num-seqs=25", "--num-gpu-blocks-override=25"),
}
STORED = [(name, way) for way in ("one rank", "two ranks") for name in CHECKPOINTS] + [
    (name, way) for way in ("drafts, chunks, bfloat16 state", "short of blocks") for name in ("fp8 by channel", "int4")
]


@pytest.fixture(scope="module")
def asked(vocab: int) -> list[tuple[list[int], int]]:
    return draw(vocab)


@pytest.mark.parametrize(("name", "flags"), STORED, ids=[", ".join(pair) for pair in STORED])
def test_quantised(
    name: str,
    flags: str,
    tmp_path: Path,
    demo_model: Path,
    servers: Callable[..., Server],
    asked: list[tuple[list[int], int]],
    record_property: Callable[[str, object], None],
):
    if flags == "two ranks" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    groups, ignore, inputs = CHECKPOINTS[name]
    stored, plain = quantized_checkpoint.write(demo_model, tmp_path, groups, ignore)
    server = Completions(servers(stored, *FLAGS, "--enable-prefix-caching", *STORED_WAYS[flags]))
    if NGRAM not in STORED_WAYS[flags]:
        assert "decode steps of up to 8 tokens run on the plugin's kernels" in server.server.log
    judge = Judge(plain, inputs)
    ways = {
        "alone": server.one_by_one(asked),
        "together": server.at_once(asked, cold=True),
        "together, from the prefix cache": server.at_once(asked),
    }
    for way, answers in ways.items():
        seen = judge.check(asked, answers)
        record_property(way, seen)
        print(f"{way}: {seen}")
    if NGRAM in STORED_WAYS[flags]:
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    if flags == "short of blocks":
        assert server.metric("vllm:num_preemptions_total") > 0
    else:
        assert sum(answer.cached_tokens for answer in ways["together, from the prefix cache"]) > 0


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
def test_quantised_as_it_is_loaded(quantization: str, servers: Callable[..., Server]):
    """What the weights become is vLLM's; the small trained model still answers right, alone and many at once."""
    rng = random.Random(7)
    log = make_log(rng, 3000)
    asker = Asker(log, rng)
    questions = [asker.ask(kind) for kind in KINDS for _ in range(8)]
    server = servers(TRAINED / "checkpoint", *FLAGS, "--enable-prefix-caching", f"--quantization={quantization}")
    assert "decode steps of up to 8 tokens run on the plugin's kernels" in server.log
    for several in ([[question] for question in questions], [questions]):
        answers = [text for some in several for text, _ in asyncio.run(ask_all(server, log, some))]
        right = sum(text == question.answer for text, question in zip(answers, questions, strict=True))
        print(f"{quantization}: {right} of {len(questions)} right")
        assert right >= 0.9 * len(questions)
