"""The kernels of a decode step against plain torch: in C, in Triton's interpreter (`tests/e2e/kernels`) and on GPUs.

The interpreter rounds bfloat16 towards zero, so it computes in fp32.
"""

import importlib
import os

import pytest
import torch
from torch import Tensor

from decode_kernels import interface, reference
from kda_kernels.interface import KdaParams, KdaState

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5


OUTSIDE = pytest.mark.skipif(INSIDE, reason="nothing of it is Triton")


@pytest.fixture(
    params=[
        pytest.param(
            ("cuda", "cpu", torch.float32), marks=pytest.mark.skipif(not INSIDE, reason="see tests/e2e/kernels")
        ),
        pytest.param(
            ("cuda", "cuda", torch.bfloat16),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
        pytest.param(("cpu", "cpu", torch.float32), marks=OUTSIDE),
        pytest.param(("cpu", "cpu", torch.bfloat16), marks=OUTSIDE),
    ],
    ids=["interpreter", "gpu", "C", "C-bf16"],
)
def where(request):
    """Which kernels, on which device, in which dtype."""
    return request.param


@pytest.fixture
def make(where):
    """make(*shape, dtype=activations', scale=1): random numbers where the kernels run."""
    _, device, activations = where
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = activations, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return draw


@pytest.fixture
def kernels(where):
    if where[0] == "cuda":
        pytest.importorskip("triton")
    return interface.kernels(where[0])


def as_stored(kernels, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The C kernels round the norm of one token, too, which the reference does of several."""
    more = 2 if kernels.__name__ == "decode_kernels.cpu" else 1
    return x.repeat(more, 1), None if residual is None else residual.repeat(more, 1)


def close(found: Tensor, wanted: Tensor) -> None:
    bound = 1e-5 if found.dtype == torch.float32 else 4e-3
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    assert error < bound, error
    assert found.shape == wanted.shape


# 144 and 300: rows that are no power of two; 1: less than a tile; 64: a power of two.
@pytest.mark.parametrize(("K", "N"), [(144, 33), (64, 1), (300, 20)])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_linear(tokens, K, N, make, kernels):
    x, residual, norm, weight = make(tokens, K), make(tokens, K, scale=30), make(K), make(N, K, scale=K**-0.5)
    close(kernels.linear(x, weight), reference.linear(x, weight))
    for other in (residual, None):
        found = kernels.norm_linear(x, other, norm, weight, EPS)
        wanted = reference.norm_linear(*as_stored(kernels, x, other), norm, weight, EPS)
        close(found[0], wanted[0][:tokens])
        assert torch.equal(found[1], wanted[1][:tokens])


def test_rows_with_a_stride(make, kernels):
    wide, weight, norm = make(2, 200), make(16, 64), make(64)
    x = wide[:, 100:164]
    close(kernels.linear(x, weight), reference.linear(x, weight))
    close(kernels.norm_linear(x, x, norm, weight, EPS)[0], reference.norm_linear(x, x, norm, weight, EPS)[0])


def route(of, x, residual, norm, gate, bias, shared, done, **options):
    more = (done,) if done is not None else ()
    if of.__name__ == "decode_kernels.cuda" and INSIDE:
        options["BN"] = 32  # rows of a program: the interpreter takes as long for one as for many
    options = {"top_k": 8, "renormalize": True, "scale": 2.4} | options
    return of.router(x, residual, norm, EPS, gate, bias, shared, *more, **options)


# The 48B's number of experts, a pruned one, and fewer than one program has rows.
@pytest.mark.parametrize(("experts", "top_k", "renormalize"), [(256, 8, True), (180, 8, False), (10, 3, True)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (3, 24), (1, 0), (2, 0)])
def test_router(tokens, width, experts, top_k, renormalize, make, kernels):
    K = 96
    x, residual, norm = make(tokens, K), make(tokens, K), make(K)
    gate, bias = make(experts, K, dtype=torch.float32, scale=K**-0.5), make(experts, dtype=torch.float32, scale=0.01)
    shared = make(2 * width, K, scale=K**-0.5) if width else None
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    options = {"top_k": top_k, "renormalize": renormalize}
    for _ in range(2):  # the second step finds what the first one left
        found = route(kernels, x, residual, norm, gate, bias, shared, done, **options)
        wanted = route(reference, *as_stored(kernels, x, residual), norm, gate, bias, shared, None, **options)
        wanted = [part[:tokens] for part in wanted]
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[2], wanted[2])
        for part in (0, 3, 4):
            close(found[part], wanted[part])
        assert done.item() == 0


@pytest.mark.parametrize("tokens", [1, 3])
def test_router_behind_the_norm(tokens, make, kernels):
    if kernels.__name__ == "decode_kernels.cpu":
        pytest.skip("of GPUs alone")
    x, norm, gate = make(tokens, 96), make(96), make(20, 96, dtype=torch.float32, scale=96**-0.5)
    bias, shared = make(20, dtype=torch.float32, scale=0.01), make(14, 96, scale=96**-0.5)
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    normed, residual, *wanted = route(kernels, x, make(tokens, 96), norm, gate, bias, shared, done)
    first, second, *found = route(kernels, normed, residual, None, gate, bias, shared, done)
    assert first is normed and second is residual
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        close(one, other)


def test_of_equal_scores_the_first_experts_are_chosen(make, kernels):
    x, norm = make(2, 64), make(64)
    gate, bias = torch.zeros(20, 64, device=x.device), torch.zeros(20, device=x.device)
    bias[11] = bias[7] = 1.0
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    _, _, ids, weights, _ = route(kernels, x, x, norm, gate, bias, None, done, top_k=4, scale=1.0)
    assert ids.tolist() == [[7, 11, 0, 1]] * 2
    assert torch.allclose(weights, torch.full_like(weights, 0.25))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_chooses_experts_that_exist(value, make, kernels):
    x, norm = make(2, 64), make(64)
    x[1, 5] = value
    gate, bias = make(180, 64, dtype=torch.float32), make(180, dtype=torch.float32, scale=0.01)
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    _, _, ids, weights, _ = route(kernels, x, make(2, 64), norm, gate, bias, None, done)
    assert ((ids >= 0) & (ids < 180)).all()
    assert len(ids[1].unique()) == 8
    assert weights[0].isfinite().all()  # the other token's


@pytest.mark.parametrize(("tokens", "K", "width", "shared"), [(1, 144, 24, 16), (3, 64, 20, 40), (2, 64, 16, 0)])
@pytest.mark.parametrize("same", [False, True], ids=["", "all tokens choose the same"])
def test_experts(same, tokens, K, width, shared, make, kernels):
    experts, top_k = 10, 3
    x, up, down = make(tokens, K), make(experts, 2 * width, K, scale=K**-0.5), make(experts, K, width)
    choices = [
        torch.randperm(experts, generator=torch.Generator().manual_seed(1 if same else n))[:top_k]
        for n in range(tokens)
    ]
    ids = torch.stack(choices).int().to(x.device)
    weights = make(tokens, top_k, dtype=torch.float32).abs()
    own = (make(tokens, shared), make(K, shared) if shared else None)
    if kernels.__name__ == "decode_kernels.cuda":
        parts = importlib.import_module("decode_kernels.cuda.experts")
        acts = parts.experts_up(x, up, ids)
        close(acts, reference.experts_up(x, up, ids))
        found = parts.experts_down(acts, down, ids, weights, *own)
        close(found, reference.experts_down(acts, down, ids, weights, *own))
    both = (x, up, down, ids, weights, *own)
    close(kernels.experts(*both), reference.experts(*both))


# With more heads and tokens than the one kernel is for, the gates are a product of their own.
@pytest.mark.parametrize(("tokens", "heads"), [(2, 2), (3, 2), (5, 28)])
@pytest.mark.parametrize("dim", [64, 128])
def test_kda(dim, tokens, heads, make, kernels):
    if tokens == 5 and INSIDE and dim == 128:
        pytest.skip("takes minutes in the interpreter")
    width, states = heads * dim, tokens + 2
    projected = make(tokens, 3 * width + heads + 2 * dim + 6)
    gates_b = make(2, width, dim, scale=dim**-0.5)
    decay = make(heads, dtype=torch.float32), make(width, dtype=torch.float32)
    params = KdaParams(make(3 * width, 4), *decay, make(dim), EPS)
    indices = torch.arange(tokens, 0, -1, dtype=torch.int32, device=projected.device)
    indices[-1] = 0  # what pads a CUDA graph
    conv, recurrent = make(states, 3, 3 * width), make(states, heads, dim, dim, dtype=torch.float32)
    found, wanted = (KdaState(conv.clone(), recurrent.clone()) for _ in range(2))
    out = kernels.kda_decode(projected, gates_b, params, found, indices)
    close(out, reference.kda_decode(projected, gates_b, params, wanted, indices))
    assert (out[-1] == 0).all()
    assert torch.equal(found.conv, wanted.conv)
    close(found.recurrent, wanted.recurrent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_chain_in_a_graph_gives_the_same_bits_each_time():
    """Every kernel begins before the one in front has ended: an order that is missing shows as bits that change."""
    decode_layer = importlib.import_module("bench.decode_layer")
    torch.manual_seed(0)
    layers = [decode_layer.Layer(1, 1) for _ in range(3)]
    x, residual = layers[0].x.clone(), layers[0].residual.clone()
    states = [(layer.state, layer.state.conv.clone(), layer.state.recurrent.clone()) for layer in layers]

    def chain() -> Tensor:
        for state, conv, recurrent in states:
            state.conv.copy_(conv)
            state.recurrent.copy_(recurrent)
        a, b = x, residual
        for layer in layers:
            a, b = layer.run(a, b)
        return a + b

    wanted = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(200):
        graph.replay()
        assert torch.equal(out, wanted)


# The 48B's sizes but for the heads, and sizes that are no power of two.
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "value", "latent"), [(2, 128, 64, 128, 512), (3, 24, 8, 20, 72), (1, 16, 16, 16, 64)]
)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_latents(tokens, heads, nope, rope, value, latent, make, kernels):
    if kernels.__name__ == "decode_kernels.cpu" and not kernels.supports(torch.float32, latent):
        pytest.skip(f"not for {latent} channels")
    projected = make(tokens, heads * (nope + rope) + latent + rope + 8)[:, : -8 if tokens == 1 else None]
    kv_b, norm = make(heads, nope + value, latent, scale=latent**-0.5), make(latent)
    packed = make(6, 2, 5, latent + rope)  # blocks of another layer between those of this one
    slots = torch.tensor([13, -1, 27][:tokens], device=projected.device)
    caches = [packed.clone()[:, 1] for _ in range(2)]
    found = kernels.latent_query(projected, kv_b, norm, EPS, caches[0], slots, nope)
    wanted = reference.latent_query(projected, kv_b, norm, EPS, caches[1], slots, nope)
    close(found, wanted)
    close(caches[0], caches[1])
    written = torch.zeros(6, 5, dtype=torch.bool, device=slots.device)
    written.view(-1)[slots[slots >= 0]] = True
    assert torch.equal(caches[0][~written], packed[:, 1][~written])
    wide = make(tokens, heads + 1, latent)[:, 1:]
    close(kernels.latent_value(wide, kv_b, nope), reference.latent_value(wide, kv_b, nope))
