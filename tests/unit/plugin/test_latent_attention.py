"""Latent attention of a prefill on the CPU: few tokens and many, over cached blocks in any order, give the same."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from vllm_kimi_linear.attention.cpu_mla import FEW_TOKENS, CpuLatentImpl
from vllm_kimi_linear.attention.cpu_mla_metadata import LatentPrefill

HEADS, LATENT, SHARED, NOPE, VALUE = 4, 512, 64, 128, 128


class Projection:
    """As vLLM's linear layers: tokens in, tokens and no bias out."""

    params_dtype = torch.float32

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return tokens @ self.weight.T, None


@pytest.fixture(scope="module")
def attention() -> CpuLatentImpl:
    torch.manual_seed(0)
    weight = torch.randn(HEADS * (NOPE + VALUE), LATENT) / LATENT**0.5
    return CpuLatentImpl(
        HEADS,
        LATENT + SHARED,
        (NOPE + SHARED) ** -0.5,
        1,
        None,
        None,
        "auto",
        None,
        "decoder",
        None,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_head_dim=NOPE + SHARED,
        v_head_dim=VALUE,
        kv_b_proj=Projection(weight),
    )


def by_definition(attention: CpuLatentImpl, query: torch.Tensor, entries: torch.Tensor, context: int) -> torch.Tensor:
    """[tokens, heads, 128] in fp64: docs/kda.md section 9, all scores at once."""
    latent, shared = entries.double().split([LATENT, SHARED], dim=-1)
    expanded = (latent @ attention.kv_b_proj.weight.double().T).view(len(entries), HEADS, NOPE + VALUE)
    keys = torch.cat([expanded[..., :NOPE], shared[:, None].expand(-1, HEADS, -1)], dim=-1)
    scores = torch.einsum("nhd,mhd->hnm", query.double(), keys) * attention.scale
    future = torch.arange(len(entries)) > context + torch.arange(len(query))[:, None]
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(future, -torch.inf).softmax(-1), expanded[..., NOPE:])


@pytest.mark.parametrize("context", [0, 1, 111, 112, 1500, 3000])
@pytest.mark.parametrize("tokens", [1, 14, FEW_TOKENS, FEW_TOKENS + 1])
def test_rows_attend_to_context_and_themselves(attention: CpuLatentImpl, tokens: int, context: int):
    torch.manual_seed(tokens + context)
    cache = torch.randn(40, 112, LATENT + SHARED)
    blocks = torch.randperm(40)[: -(-context // 112)]
    query, fresh = torch.randn(tokens, HEADS, NOPE + SHARED), torch.randn(tokens, LATENT + SHARED)
    out = torch.empty(tokens, HEADS * VALUE)
    attention.forward_mha(
        query,
        fresh[:, :LATENT],
        fresh[:, None, LATENT:],
        cache,
        type("Metadata", (), {"prefill": (LatentPrefill(0, tokens, context, blocks),)})(),
        torch.ones(()),
        out,
    )
    want = by_definition(attention, query, torch.cat([cache[blocks].flatten(0, 1)[:context], fresh]), context)
    assert (out.view_as(want) - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("attend", ["_attend", "_attend_few"])
def test_a_long_context_is_never_held_whole(attention: CpuLatentImpl, attend: str):
    """At most the tile at hand, and the one before it, which the loop has not let go."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def tiles() -> Iterator[torch.Tensor]:
        for _ in range(5):
            tile = torch.randn(32, LATENT + SHARED)
            seen.append(weakref.ref(tile))
            yield tile
            del tile
            assert sum(ref() is not None for ref in seen) <= 1

    query, fresh = torch.randn(3, HEADS, NOPE + SHARED), torch.randn(3, LATENT + SHARED)
    getattr(attention, attend)(query, fresh, tiles())
    assert len(seen) == 5
