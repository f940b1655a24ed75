"""On a GPU, in bfloat16: every way to serve a prompt is as near to the fp32 reference as transformers in bf16 is.

vLLM's latent attention takes no fp32 there, so answers are not equal token by token. Each server's own greedy answers
are scored by the reference instead, token after token: where the best token leads by more than bf16 can overturn, the
server must have taken it, and over all it may not take others much more often than transformers in bf16 would.
`test_bfloat16.py`, which runs here too, bounds the mean divergence.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from examples.demo_model.conversations import KINDS, Asker, make_log
from kimi_demo.demo import TRAINED
from kimi_demo.reference import HfReference, Score
from kimi_demo.server import Server
from tests.support import quantized_checkpoint
from tests.support.completions import Answer, Completions
from tests.support.logs import ask_all
from tests.support.prompts import LENGTHS, Stream
from tests.support.rounded_inputs import RoundedInputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# A fixed cache, so that several servers may share a card; of the memory, so much must be free.
FLAGS = (
    "--dtype=bfloat16",
    "--max-model-len=4096",
    "--enable-prompt-tokens-details",
    "--kv-cache-memory-bytes=1G",
    "--gpu-memory-utilization=0.1",
)
NGRAM = '--speculative-config={"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3}'
CHUNKS = ("--max-num-batched-tokens=768",)  # four blocks, more than there are drafts
SHARED = "--decode-context-parallel-size="
WAYS = {
    "graphs": ("--enable-prefix-caching",),
    "vLLM's layers": ("--enable-prefix-caching", '--additional-config={"decode_kernels": false}'),
    "eager, short of blocks": (
        "--enforce-eager",
        "--max-num-batched-tokens=64",
        "--max-num-seqs=32",
        "--num-gpu-blocks-override=25",  # one sequence of the full length needs 23
        "--no-enable-prefix-caching",
    ),
    "graphs, short of blocks": (
        "--max-num-seqs=25",  # graphs need a block for each sequence
        "--num-gpu-blocks-override=25",
        "--no-enable-prefix-caching",
    ),
    "drafts": (NGRAM, "--no-enable-prefix-caching"),
    "drafts, prefixes kept": (NGRAM, "--enable-prefix-caching"),
    "drafts, prefixes kept, chunks of few blocks": (
        NGRAM,
        "--enable-prefix-caching",
        *CHUNKS,
    ),
    "state in bfloat16": ("--mamba-ssm-cache-dtype=bfloat16", "--no-enable-prefix-caching"),
    "two ranks": ("--tensor-parallel-size=2", "--enable-prefix-caching"),
    "four ranks": ("--tensor-parallel-size=4", "--enable-prefix-caching"),
    "two ranks, drafts, chunks of few blocks": (
        "--tensor-parallel-size=2",
        NGRAM,
        "--enable-prefix-caching",
        *CHUNKS,
    ),
    "two ranks, shared latents": ("--tensor-parallel-size=2", SHARED + "2", "--no-enable-prefix-caching"),
    "four ranks, shared latents": ("--tensor-parallel-size=4", SHARED + "4", "--no-enable-prefix-caching"),
    "two ranks, shared latents, short of blocks": (
        "--tensor-parallel-size=2",
        SHARED + "2",
        "--block-size=96",  # on both ranks 192 tokens, as on one: as few blocks are short
        "--max-num-batched-tokens=64",
        "--max-num-seqs=25",
        "--num-gpu-blocks-override=25",
        "--no-enable-prefix-caching",
    ),
    "two ranks, experts apart": ("--tensor-parallel-size=2", "--enable-expert-parallel", "--enable-prefix-caching"),
    "latents by Triton": ("--attention-backend=TRITON_MLA", "--enable-prefix-caching"),
    "worker apart, steps in turn": (
        "--distributed-executor-backend=mp",
        "--no-async-scheduling",
        "--enable-prefix-caching",
    ),
    **{
        f"graphs {mode}": (f'--compilation-config={{"cudagraph_mode":"{mode}"}}', "--enable-prefix-caching")
        for mode in ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY")
    },
}
TOKENS = 64
GROWING = (180,) * 24  # one block of 192 tokens each, until their answers need another: more than a short cache has
RATIO = 1.2


@pytest.fixture(scope="module")
def asked(vocab: int) -> list[tuple[list[int], int]]:
    """Prompts of every length, the later half of each a repetition, so that drafts find something to propose."""
    stream = Stream(vocab, seed=5)
    prompts = []
    for length in (*LENGTHS, *GROWING):
        half = stream.prompt(-(-length // 2))
        prompts.append(((half + half)[:length], TOKENS))
    return prompts


class Judge:
    """The reference in fp32, and what bf16 costs it."""

    def __init__(self, model: Path, inputs: tuple[str, int | None] | None = None) -> None:
        """inputs: which weights' products round their inputs to fp8, and how many channels share a scale."""
        # On a GPU, with the servers: on a CPU the scores take longer than all else.
        device = f"cuda:{torch.cuda.device_count() - 1}"
        self.reference, self.rough = (HfReference(model, dtype, device) for dtype in (torch.float32, torch.bfloat16))
        self.rounding = RoundedInputs(self.rough.model, *inputs) if inputs else contextlib.nullcontext()
        self.scores: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Score, list[int]]] = {}

    def score(self, prompt: list[int], answer: list[int]) -> tuple[Score, list[int]]:
        """And the tokens that transformers in bf16 takes in the same contexts."""
        key = tuple(prompt), tuple(answer)
        if key not in self.scores:
            with self.rounding:
                rough = self.rough.score(prompt, answer).argmax
            self.scores[key] = self.reference.score(prompt, answer), rough
        return self.scores[key]

    def check(self, asked: list[tuple[list[int], int]], answers: list[Answer]) -> str:
        """No clear choice missed, and others hardly more often than in bf16 there; says what was seen."""
        tokens, others, rough_others, clear = 0, 0, 0, 0
        missed = []  # (length of the prompt, place in the answer, lead of the reference's choice)
        for (prompt, _), answer in zip(asked, answers, strict=True):
            score, rough = self.score(prompt, answer.tokens)
            choices = list(zip(score.margins, score.argmax, score.answer, strict=True))
            missed += [
                (len(prompt), at, lead)
                for at, (lead, best, taken) in enumerate(choices)
                if lead > Score.clear_lead and best != taken
            ]
            tokens += len(choices)
            clear += sum(lead > Score.clear_lead for lead in score.margins)
            others += sum(best != taken for _, best, taken in choices)
            rough_others += sum(a != b for a, b in zip(score.argmax, rough, strict=True))
        seen = f"{others} of {tokens} tokens not the reference's, in transformers bf16 {rough_others}; {clear} clear"
        assert not missed, f"{seen}; missed: {missed}"
        assert others <= RATIO * rough_others + 2 * math.sqrt(rough_others), seen  # which of two near ones is chance
        return seen


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


@pytest.fixture(scope="module")
def judge(demo_model: Path) -> Judge:
    return Judge(demo_model)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, servers: Callable[..., Server], demo_model: Path) -> Completions:
    flags = WAYS[request.param]
    sizes = [flag.partition("=")[2] for flag in flags if flag.startswith("--tensor-parallel-size=")]
    ranks = int(sizes[0]) if sizes else 1
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return Completions(servers(demo_model, *FLAGS, *flags))


def differing(ours: list[Answer], others: list[Answer]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(ours, others, strict=True))


def test_every_way(
    way: Completions,
    asked: list[tuple[list[int], int]],
    judge: Judge,
    record_property: Callable[[str, object], None],
):
    alone = way.one_by_one(asked)
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = way.at_once(asked[i] for i in order)
    together = [shuffled[order.index(i)] for i in range(len(asked))]
    seen = {
        "alone": judge.check(asked, alone),
        "together": judge.check(asked, together),
        "answers that differ, alone and together": f"{differing(alone, together)} of {len(asked)}",
    }
    for name, value in seen.items():
        record_property(name, value)
        print(f"{name}: {value}")
    if "--speculative-config" in str(way.server.flags):
        assert way.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    if "--enable-prefix-caching" in way.server.flags:
        assert sum(answer.cached_tokens for answer in together) > 0
    assert ("its answers have not been compared" in way.server.log) == (SHARED in str(way.server.flags))
    if "--num-gpu-blocks-override=25" in way.server.flags:
        assert way.metric("vllm:num_preemptions_total") > 0


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_and_awake(level: int, servers: Callable[..., Server], demo_model: Path, asked: list):
    """Weights go to the host or are read again, all states and latents are lost: the answers are those of before."""
    flags = (*FLAGS, "--enable-prefix-caching", "--enable-sleep-mode")
    server = Completions(servers(demo_model, *flags, env={"VLLM_SERVER_DEV_MODE": "1"}))

    def call(path: str, **body: object) -> None:
        reply = httpx.post(f"{server.server.url}/{path}", json=body or None, timeout=120, trust_env=False)
        assert reply.status_code == 200, (path, reply.text)

    before = server.one_by_one(asked)
    for _ in range(2):
        call(f"sleep?level={level}")
        if level == 2:
            call("wake_up?tags=weights")
            call("collective_rpc", method="reload_weights")
            call("wake_up?tags=kv_cache")
        else:
            call("wake_up")
        after = server.one_by_one(asked)
        assert differing(before, after) == 0
        assert sum(answer.cached_tokens for answer in after) == 0


def test_warm_answers(
    servers: Callable[..., Server],
    demo_model: Path,
    vocab: int,
    judge: Judge,
):
    """Prompts read once before are served from the prefix cache."""
    server = Completions(servers(demo_model, *FLAGS, *WAYS["graphs"]))
    stream = Stream(vocab, seed=6)
    document = stream.prompt(2000)
    questions = [(document + stream.prompt(length), TOKENS) for length in (1, 64, 100, 500)]
    cold = server.one_by_one(questions[:1]) + server.at_once(questions[1:], cold=True)
    warm = server.at_once(questions)
    assert sum(answer.cached_tokens for answer in warm) > 0
    print("cold:", judge.check(questions, cold))
    print("warm:", judge.check(questions, warm), f"; {differing(cold, warm)} differ from cold")
