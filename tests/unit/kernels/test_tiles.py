"""Experts in the order of tensor cores' tiles: in Triton's interpreter (`tests/e2e/kernels`) and on GPUs."""

import importlib
import os
import re

import pytest
import torch
from torch import Tensor

from decode_kernels import interface, reference
from decode_kernels.weights import INT4_ZERO, Tiles

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
EXPERTS, GROUP = 5, 32


def plain(N: int, K: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Integers [EXPERTS, N, K], and scales [EXPERTS, N, K / group] of very different sizes."""
    generator = torch.Generator().manual_seed(N + K)
    values = torch.randint(0, 16, (EXPERTS, N, K), generator=generator)
    return values, (torch.rand(EXPERTS, N, K // group, generator=generator) ** 4 + 1e-3).bfloat16()


def in_tiles(values: Tensor, scales: Tensor) -> Tiles:
    """By the sentence that defines the order."""
    _, N, K = values.shape
    words = torch.zeros(len(values), K // 16, 2 * N, dtype=torch.int64)
    block = torch.arange(N // 64)[:, None]
    for word in range(128):
        i, j, q = word // 16, word // 4 % 4, word % 4
        for p in range(8):
            row, column = 16 * q + 8 * (p // 2 % 2) + i, 2 * j + 8 * (p % 2) + p // 4
            picked = values[:, 64 * block + row, 16 * torch.arange(K // 16) + column]  # [E, N / 64, K / 16]
            words[:, :, word::128] |= picked.transpose(1, 2) << 4 * p
    ordered = torch.empty(len(values), scales.shape[-1], N, dtype=scales.dtype)
    for row in range(64):
        ordered[:, :, 8 * (row % 8) + row // 8 :: 64] = scales[:, row::64].transpose(1, 2)
    return Tiles(torch.where(words >= 1 << 31, words - (1 << 32), words).int(), ordered, K // scales.shape[-1])


@pytest.mark.parametrize("group", [16, 32, 128])
def test_what_tiles_stand_for(group):
    values, scales = plain(128, 384, group)
    wanted = (values - INT4_ZERO) * scales.float().repeat_interleave(group, -1)
    tiles = in_tiles(values, scales)
    assert tiles.shape == wanted.shape
    assert torch.equal(tiles.float(), wanted)
    assert torch.equal(tiles[torch.tensor([3, 1])].float(), wanted[[3, 1]])


@pytest.mark.parametrize(
    ("values", "scales", "group", "said"),
    [
        ((2, 4, 128), (2, 2, 64), 64, r"scales have shape \[2, 2, 64\]; give \[2, 1, 64\]"),
        ((2, 4, 64), (2, 2, 32), 32, r"\[32, 64\] in groups of 32; give 64 rows"),
        ((2, 4, 128), (2, 8, 64), 8, "in groups of 8"),
    ],
)
def test_other_shapes_are_refused(values, scales, group, said):
    with pytest.raises(ValueError, match=said):
        Tiles(torch.zeros(values, dtype=torch.int32), torch.zeros(scales), group)


@pytest.mark.gpu
def test_the_order_is_hummings():
    """vLLM's kernel for these weights packs them itself."""
    pytest.importorskip("humming")
    transform = importlib.import_module("humming.transform")
    dtypes = importlib.import_module("humming.dtypes")
    values, scales = plain(256, 384)
    packed = (values.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int().cuda()
    theirs = transform.transform_humming_weight(packed, dtypes.uint4, dtypes.bfloat16, packed=True)
    ours = in_tiles(values, scales)
    assert torch.equal(theirs.cpu().view_as(ours.values), ours.values)
    assert torch.equal(transform.transform_humming_weight_scale(scales.cuda()).cpu(), ours.scales)


# 24 slices are three turns of eight warps, 12 not a whole number; so are 4.
@pytest.mark.parametrize(("K", "inter"), [(384, 64), (192, 128)])
@pytest.mark.parametrize(("tokens", "shared"), [(1, True), (3, False)])
@pytest.mark.parametrize("size", [1.0, pytest.param(1e12, marks=[pytest.mark.soak] * INSIDE)])
def test_experts(K, inter, tokens, shared, size, where):
    pytest.importorskip("triton")
    device, dtype = where
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(device, dtype)

    up, down = (
        Tiles(tiles.values.to(device), tiles.scales.to(device), tiles.group)
        for tiles in (in_tiles(*plain(2 * inter, K)), in_tiles(*plain(K + 64, inter)))
    )
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)]).int().to(device)
    weights = torch.rand(tokens, 3, generator=generator).to(device)
    x, shared_weight = make(tokens, K), (make(K, 64) / size if shared else None)
    given = ids, weights, make(tokens, 64), shared_weight
    found = interface.kernels("cuda").experts(x, up, down, *given)  # which has 64 rows more than are wanted
    wanted = reference.experts(x, up.float(), down.float()[:, :K], *given)
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < (3e-5 if dtype == torch.float32 else 6e-3), error


@pytest.mark.skipif(INSIDE, reason="compiles")
def test_each_lane_has_the_words_of_its_tile():
    """Tensor cores take from a lane what Triton gives it: a slice to a warp, its 32 lanes in order."""
    pytest.importorskip("triton")
    from bench import compiled
    from decode_kernels.cuda import tiles

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    K, inter, ids = 2304, 1024, empty(1, 8, dtype=torch.int32)
    up = Tiles(empty(8, K // 16, 4 * inter, dtype=torch.int32), empty(8, K // 32, 2 * inter), 32)
    with compiled.recorded() as found:
        tiles.tiled_up(empty(1, K), up, ids, inter)
    [(kernel, *more)] = found
    text = compiled.compiled_variant(kernel, *more).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{.*threadsPerWarp = (\[[^\]]*\])", text, re.MULTILINE))
    used = {
        layouts[name]
        for line in text.splitlines()
        if "elementwise_inline_asm" in line
        for name in re.findall(r"tensor<8x32x\d+xi32, (#\w+)>", line)
    }
    assert used == {"[1, 32, 1]"}, text
