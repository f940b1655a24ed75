"""LoRA on a CPU: an adapter's tokens are those of transformers with it merged into the weights, in fp32.

The model's own stay what they are, whoever shares a step with it, a prefix, or a slot of the adapters.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference
from kimi_demo.server import Server, StartError
from tests.conftest import FLAGS, TWO_WORKERS
from tests.support import adapters, patience, quantized_checkpoint
from tests.support.completions import Answer, Completions
from tests.support.prompts import ROUTER_GAP, Stream, is_well_posed
from vllm_kimi_linear.adapters.names import TARGETS

LORA = ("--enable-lora", "--max-lora-rank=8")
CACHING = ("--dtype=float32", "--max-model-len=4096", "--kv-cache-memory-bytes=256M", "--max-num-batched-tokens=512")
BLOCK = 112  # tokens of a block of the cache, for the demo checkpoint in fp32
TOKENS = 24

Adapters = dict[str | None, Path | None]  # by the name that requests ask for; None is the model itself


def modules_alone(model: Any, folder: Path) -> Adapters:
    """An adapter for each kind of module that one may target: of every layer that has it, and large."""
    kinds: dict[str, list[str]] = {}
    for name in adapters.modules(model, TARGETS):
        holder, _, part = name.rpartition(".")
        owner = "shared_experts" if "shared_experts" in name else type(model.get_submodule(holder)).__name__
        kinds.setdefault(f"{owner}.{part}", []).append(name)
    assert {kind.rpartition(".")[2] for kind in kinds} == set(TARGETS)
    assert len(kinds) == 9 + 3 + 3 + 3  # of KDA, of MLA, of the dense layer, of shared experts
    return {None: None} | {kind: adapters.write(folder / kind, model, own, size=1.0) for kind, own in kinds.items()}


def modules_together(model: Any, folder: Path) -> Adapters:
    """Three adapters of every module."""
    names = adapters.modules(model, TARGETS)
    return {None: None} | {f"a{seed}": adapters.write(folder / str(seed), model, names, seed=seed) for seed in range(3)}


@pytest.fixture(scope="module")
def alone(reference: HfReference, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return modules_alone(reference.model, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def whole(reference: HfReference, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return modules_together(reference.model, tmp_path_factory.mktemp("whole"))


def flags_of(known: Adapters) -> list[str]:
    return ["--lora-modules", *(f"{name}={folder}" for name, folder in known.items() if name is not None)]


def ask(server: Completions, asked: Sequence[tuple[str | None, list[int]]], tokens: int = TOKENS) -> list[Answer]:
    """All at once, in this order."""

    async def run() -> list[Answer]:
        async with server.connect() as client:
            asks = (server.ask(client, prompt, tokens, **({"model": name} if name else {})) for name, prompt in asked)
            return await asyncio.gather(*asks)

    return asyncio.run(run())


def check(
    reference: HfReference,
    known: Adapters,
    asked: Sequence[tuple[str | None, list[int]]],
    answers: Sequence[Answer],
) -> None:
    """Every answer its own adapter's, and no other's."""
    decided, wrong = 0, []
    for (name, prompt), answer in zip(asked, answers, strict=True):
        with adapters.merged(reference.model, known[name]):
            score = reference.score(prompt, answer.tokens)
        decided += is_well_posed(score)
        if is_well_posed(score) and not score.agrees:
            wrong.append((name, len(prompt)))
    assert not wrong
    assert decided > len(asked) // 2


def test_each_module_alone(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, alone: Adapters
) -> None:
    """More adapters than slots; one that any module ignored would answer as the model does."""
    server = servers(demo_model, *FLAGS, *LORA, "--max-loras=4", "--max-cpu-loras=20", *flags_of(alone))
    assert "decode steps run on vLLM's layers: the plugin's kernels do not take LoRA" in server.log
    prompt = Stream(vocab, seed=21).prompt(70)
    asked = [(name, prompt) for name in alone]
    answers = ask(Completions(server), asked)
    own = answers[0].tokens
    assert [name for name, answer in zip(alone, answers, strict=True) if answer.tokens == own] == [None]
    check(reference, alone, asked, answers)


def test_many_at_once(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, whole: Adapters
) -> None:
    """Prompts of many lengths for the model and three adapters, in chunks and steps that they share."""
    server = Completions(servers(demo_model, *FLAGS, *LORA, "--max-loras=3", *flags_of(whole)))
    stream, choose = Stream(vocab, seed=22), random.Random(22)
    lengths = (1, 2, 17, 63, 64, 65, 130, 300, 700, 1100)
    asked = [(name, stream.prompt(length)) for length in lengths for name in whole]
    choose.shuffle(asked)
    check(reference, whole, asked, ask(server, asked))


@pytest.mark.soak
def test_one_slot(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, whole: Adapters
) -> None:
    """vLLM's default; in its torch products a token without an adapter would have that of the last slot."""
    server = Completions(servers(demo_model, *FLAGS, *LORA, *flags_of(whole)))
    stream = Stream(vocab, seed=23)
    asked = [(name, stream.prompt(length)) for length in (5, 80) for name in (None, "a0", None, "a1", "a2", None)]
    check(reference, whole, asked, ask(server, asked))


def test_no_prefix_is_shared(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, whole: Adapters
) -> None:
    """Neither latents nor states of one adapter serve another, or the model; each finds its own again."""
    caching = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
    server = Completions(servers(demo_model, *CACHING, *caching, *LORA, "--max-loras=2", *flags_of(whole)))
    stream, asked, answers = Stream(vocab, seed=24), [], []

    def decides(prompt: list[int], name: str | None) -> bool:
        with adapters.merged(reference.model, whole[name]):
            return reference.score(prompt, [0]).router_gap > ROUTER_GAP

    for _ in range(2):
        while not all(decides(prompt := stream.prompt(3 * BLOCK + 20), name) for name in whole):
            pass
        for name in whole:  # one after the other, so that each could find what the others left
            asked.append((name, prompt))
            answers += ask(server, asked[-1:])
            assert answers[-1].cached_tokens == 0
    again = [(name, prompt + stream.prompt(30)) for name, prompt in asked] * 2
    warm = ask(server, again)
    assert all(answer.cached_tokens >= 2 * BLOCK for answer in warm)
    check(reference, whole, asked + again, answers + warm)


WAYS: dict[str, tuple[str, ...]] = {
    "two ranks": ("--tensor-parallel-size=2",),
    "two stages": ("--pipeline-parallel-size=2",),
    "drafts": ('--speculative-config={"method":"ngram","num_speculative_tokens":2,"prompt_lookup_min":1}',),
    "two ranks, drafts": (
        "--tensor-parallel-size=2",
        '--speculative-config={"method":"ngram","num_speculative_tokens":2,"prompt_lookup_min":1}',
    ),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "two ranks" else [pytest.mark.soak]) for way in WAYS]
)
def test_every_way(
    way: str, reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, whole: Adapters
) -> None:
    flags = (*FLAGS, *LORA, "--max-loras=2", *flags_of(whole), *WAYS[way])
    server = Completions(servers(demo_model, *flags, env=TWO_WORKERS if "two" in way else None))
    stream = Stream(vocab, seed=25)
    asked = [(name, stream.prompt(length) * 2) for length in (3, 40, 150) for name in whole]
    check(reference, whole, asked, ask(server, asked))


@pytest.mark.soak
def test_on_quantised_weights(tmp_path: Path, vocab: int, servers: Callable[..., Server]) -> None:
    """What an adapter adds is in full, on weights that stay as they are stored."""
    write_checkpoint(tmp_path / "original", layers=5)
    groups = {"group_0": ("fp8 by channel", ["Linear"])}
    stored, plain = quantized_checkpoint.write(tmp_path / "original", tmp_path, groups)
    reference = HfReference(plain)
    names = adapters.modules(reference.model, TARGETS)
    known: Adapters = {None: None, "a": adapters.write(tmp_path / "a", reference.model, names)}
    server = Completions(servers(stored, *CACHING, *LORA, *flags_of(known)))
    stream = Stream(vocab, seed=26)
    asked = [(name, stream.prompt(length)) for length in (9, 70, 130) for name in known]
    check(reference, known, asked, ask(server, asked))


def test_bfloat16(
    reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path, whole: Adapters
) -> None:
    flags = ("--dtype=bfloat16", *CACHING[1:], *LORA, "--max-loras=3", *flags_of(whole))
    server = Completions(servers(demo_model, *flags))
    stream = Stream(vocab, seed=27)
    asked = [(name, stream.prompt(length)) for length in (9, 70, 130) for name in whole]
    for (name, prompt), answer in zip(asked, ask(server, asked), strict=True):
        with adapters.merged(reference.model, whole[name]):
            assert not reference.score(prompt, answer.tokens).clearly_wrong()


LAYER = "model.layers.3"  # with latent attention, and experts
EXPERTS = f"{LAYER}.mlp.experts"


def of(name: str, rows: int = 128, columns: int = 128, rank: int = adapters.RANK) -> dict[str, torch.Tensor]:
    stem = f"{adapters.PREFIX}{name}"
    return {f"{stem}.lora_A.weight": torch.ones(rank, columns), f"{stem}.lora_B.weight": torch.ones(rows, rank)}


def without_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name}


# What is wrong -> the adapter's tensors, what the sentence names, and its remedy.
REFUSED: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "folded": (of(f"{LAYER}.self_attn.kv_b_proj"), f"{LAYER}.self_attn.kv_b_proj", "merge_and_unload"),
    "experts": (of(EXPERTS) | of(f"{EXPERTS}.base_layer"), EXPERTS, "merge_and_unload"),
    "an expert of the remote code's": (
        of(f"{LAYER}.block_sparse_moe.experts.0.w1"),
        "experts.0.w1",
        "merge_and_unload",
    ),
    "the output matrix": (of("lm_head"), "lm_head", "merge_and_unload"),
    "a layer too many": (of("model.layers.99.self_attn.o_proj"), "model.layers.99.self_attn.o_proj", "merge"),
    "of a smaller model": (of(f"{LAYER}.self_attn.o_proj", 64, 64), f"{LAYER}.self_attn.o_proj", "trained on this"),
    "of another rank": (of(f"{LAYER}.self_attn.q_proj", rank=2), f"{LAYER}.self_attn.q_proj", "trained on this"),
    "half of it": (
        without_b(of(f"{LAYER}.self_attn.o_proj", columns=512)),
        f"{LAYER}.self_attn.o_proj.lora_B",
        "save the adapter",
    ),
    "nothing": ({}, "adapter_model has no tensor", "save the adapter again"),
}


def test_what_cannot_be_served_is_refused_when_it_is_loaded(
    reference: HfReference,
    vocab: int,
    servers: Callable[..., Server],
    demo_model: Path,
    tmp_path: Path,
    whole: Adapters,
) -> None:
    """In one sentence, and the server goes on, on two ranks, too."""
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | TWO_WORKERS
    server = Completions(servers(demo_model, *FLAGS, *LORA, "--tensor-parallel-size=2", env=env))

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{server.server.url}/v1/{path}", json=body, timeout=patience.SECONDS, trust_env=False)

    for index, (tensors, named, remedy) in enumerate(REFUSED.values()):
        folder = adapters.save(tmp_path / str(index), tensors)
        reply = post("load_lora_adapter", lora_name=str(index), lora_path=str(folder))
        assert reply.status_code >= 400
        message = reply.json()["error"]["message"]
        assert named in message and remedy in message, message
        assert post("completions", model=str(index), prompt="a", max_tokens=1).status_code == 404
    stream = Stream(vocab, seed=28)
    for name in ("a0", "a1"):
        assert post("load_lora_adapter", lora_name=name, lora_path=str(whole[name])).status_code == 200
        asked = [(None, stream.prompt(30)), (name, stream.prompt(30))]
        check(reference, whole, asked, ask(server, asked))
    assert post("unload_lora_adapter", lora_name="a0").status_code == 200


def test_an_adapter_of_the_command_line_that_is_refused_ends_the_start(
    servers: Callable[..., Server], demo_model: Path, tmp_path: Path
) -> None:
    tensors, named, remedy = REFUSED["folded"]
    folder = adapters.save(tmp_path / "folded", tensors)
    with pytest.raises(StartError) as error:
        servers(demo_model, *FLAGS, *LORA, f"--lora-modules=bad={folder}")
    assert named in error.value.log and remedy in error.value.log
