"""Quantised checkpoints on a CPU: the tokens are those of transformers on the weights that they stand for, in fp32."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import TWO_WORKERS
from tests.support import quantized_checkpoint
from tests.support.completions import Completions
from tests.support.prompts import LENGTHS, Stream, is_well_posed

FLAGS = ("--dtype=float32", "--max-model-len=1024", "--kv-cache-memory-bytes=64M", "--max-num-batched-tokens=256")
ALL = {"group_0": ("fp8 by channel", ["Linear"])}
# Checkpoint -> groups and what is left out.
CHECKPOINTS: dict[str, tuple[dict[str, tuple[str, list[str]]], list[str] | None]] = {
    "fp8 by channel": (ALL, None),
    "fp8 by block, projections plain": ({"group_0": ("fp8 by block", ["Linear"])}, ["lm_head", "re:.*self_attn.*"]),
    "int4 experts": ({"group_0": ("int4, groups of 32", ["Linear"])}, quantized_checkpoint.EXPERTS_ALONE),
    "several ways": (
        {
            "group_0": ("fp8 by channel", [r"re:.*self_attn\.(q|k|b|f_a)_proj.*", r"re:.*down_proj"]),
            "group_1": ("int8", [r"re:.*self_attn\.(v|g_a|o)_proj", r"re:.*gate_proj"]),
            "group_2": ("int8, packed", [r"re:.*up_proj", r"re:.*(f_b|kv_b)_proj", "lm_head"]),
            "group_3": ("int4, groups of 32", [r"re:.*experts\.\d+\..*"]),
        },
        [],
    ),
}


TWO_RANKS = ("--tensor-parallel-size=2",)
NGRAM = ('--speculative-config={"method":"ngram","num_speculative_tokens":2,"prompt_lookup_min":1}',)
BF16 = ("--dtype=bfloat16",)
CASES = [
    pytest.param("fp8 by block, projections plain", BF16, id="fp8 by block, projections plain, bfloat16"),
    pytest.param("several ways", TWO_RANKS, id="several ways, two ranks"),
    *(
        pytest.param(name, flags, marks=pytest.mark.soak, id=f"{name} {' '.join(flags)}"[:60])
        for name in CHECKPOINTS
        for flags in ((), BF16, TWO_RANKS, NGRAM, ("--num-gpu-blocks-override=12", "--max-num-seqs=8"))
    ),
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_tokens_are_those_of_the_weights_it_stands_for(
    name: str, flags: tuple[str, ...], tmp_path: Path, servers: Callable[..., Server], vocab: int
) -> None:
    groups, ignore = CHECKPOINTS[name]
    write_checkpoint(tmp_path / "original", layers=5)
    stored, plain = quantized_checkpoint.write(tmp_path / "original", tmp_path, groups, ignore)
    completions = Completions(servers(stored, *FLAGS, *flags, env=TWO_WORKERS if flags == TWO_RANKS else None))
    stream = Stream(vocab, seed=3)
    asked = [(stream.prompt(length), 24) for length in (*LENGTHS[:6], 300, 500)]
    reference, decided = HfReference(plain), 0
    for (prompt, _), answer in zip(asked, completions.at_once(asked), strict=True):
        score = reference.score(prompt, answer.tokens)
        if flags == BF16:
            assert not score.clearly_wrong()
        else:
            assert score.agrees or not is_well_posed(score)
        decided += is_well_posed(score)
    assert decided > len(asked) // 2
