"""The two forms of the operator against each other and against transformers' layer."""

import inspect

import pytest
import torch

from kda_kernels import reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState, PrefillArgs

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129]


def operands(tokens, decay, beta, dtype=torch.float64, heads=2, dim=32):
    make = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, tokens, heads, dim, generator=make, dtype=torch.float64)
    g = -torch.rand(tokens, heads, dim, generator=make, dtype=torch.float64) * 2
    if decay == "one step of -87":
        g[tokens // 2] = -87.0
    elif decay == "one step beyond any dtype":
        g[tokens // 2] = -1e30
    elif decay == "-1e-6":
        g = torch.full_like(g, -1e-6)
    elif decay == "-87":
        g = torch.full_like(g, -87.0)
    logits = torch.randn(tokens, heads, generator=make, dtype=torch.float64)
    wide_beta = torch.sigmoid(logits + {"0": -20.0, "any": 0.0, "1": 20.0}[beta])
    state = torch.randn(heads, dim, dim, generator=make, dtype=torch.float64)
    wide = (reference.l2norm(q) * dim**-0.5, reference.l2norm(k), v, g, wide_beta, state)
    return [x.to(dtype) for x in wide]


@pytest.mark.parametrize("beta", ["0", "any", "1"])
@pytest.mark.parametrize("decay", ["any", "one step of -87", "one step beyond any dtype", "-1e-6", "-87"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunk_form_equals_recurrence(tokens, decay, beta, relative_error):
    args = operands(tokens, decay, beta)
    for got, want in zip(reference.chunk_kda(*args), reference.recurrent_kda(*args), strict=True):
        assert relative_error(got, want) < 1e-11


@pytest.mark.parametrize("decay", ["any", "one step of -87", "one step beyond any dtype", "-1e-6", "-87"])
def test_chunk_form_in_fp32_does_not_overflow(decay, relative_error):
    wide, narrow = operands(129, decay, "any"), operands(129, decay, "any", torch.float32)
    for got, want in zip(reference.chunk_kda(*narrow), reference.recurrent_kda(*wide), strict=True):
        assert relative_error(got, want) < 5e-6


def test_chunk_length_does_not_matter(relative_error):
    q, k, v, g, beta, state = args = operands(129, "any", "any")
    want = reference.recurrent_kda(*args)[0]
    for chunk in (1, 16, 40, 64, 200):
        assert relative_error(reference.chunk_kda(q, k, v, g, beta, state, chunk)[0], want) < 1e-11


@pytest.fixture(scope="module")
def layer():
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = transformers.KimiLinearConfig(
        hidden_size=48,
        num_hidden_layers=1,
        linear_attn_config={
            "head_dim": 32,
            "num_heads": 3,
            "short_conv_kernel_size": 4,
            "kda_layers": [1],
            "full_attn_layers": [],
        },
    )
    # Where fla is installed transformers prefers its Triton kernels, which need a GPU.
    patch = pytest.MonkeyPatch()
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        patch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    torch.manual_seed(0)
    layer = module.KimiLinearDeltaAttention(config, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        layer.conv1d.weight.copy_(torch.randn_like(layer.conv1d.weight))
        layer.o_norm.weight.copy_(1 + 0.1 * torch.randn_like(layer.o_norm.weight))
        layer.forget_gate.A_log.copy_(torch.tensor([1.0, 4.0, 16.0]).log().view(1, 1, 3, 1))
        layer.forget_gate.dt_bias.copy_(torch.linspace(-7, 1, 96)[torch.randperm(96)])
    yield layer, config
    patch.undo()


class OurLayer:
    """transformers' projections around our operator."""

    def __init__(self, layer):
        self.layer = layer
        self.params = KdaParams(
            layer.conv1d.weight.squeeze(1),
            layer.forget_gate.A_log.flatten(),
            layer.forget_gate.dt_bias,
            layer.o_norm.weight,
            layer.layer_norm_epsilon,
        )
        heads, dim = self.params.heads, self.params.head_dim
        conv, recurrent = (3, 3, 3 * heads * dim), (3, heads, dim, dim)
        self.state = KdaState(torch.full(conv, torch.nan), torch.full(recurrent, torch.nan))

    def __call__(self, backend, x, has_initial_state, step=False):
        layer = self.layer
        qkv = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], 1)
        gate = layer.forget_gate
        inputs = KdaInputs(qkv, gate.f_b_proj(gate.f_a_proj(x)), layer.b_proj(x), layer.g_b_proj(layer.g_a_proj(x)))
        state_indices, out = torch.tensor([2], dtype=torch.int32), torch.full_like(inputs.output_gate, torch.nan)
        if step:
            backend.decode(DecodeArgs(inputs, self.params, self.state, state_indices, out))
        else:
            bounds = torch.tensor([0, x.shape[0]], dtype=torch.int32)
            tables = (bounds, state_indices, torch.tensor([has_initial_state]))
            backend.prefill(PrefillArgs(inputs, self.params, self.state, *tables, out))
        return layer.o_proj(out)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 150])
def test_prefill_then_decode_equals_transformers(tokens, layer, backend, relative_error):
    theirs, config = layer
    cache = pytest.importorskip("transformers").DynamicCache(config=config)
    ours = OurLayer(theirs)
    x = torch.randn(tokens + 12, 48, generator=torch.Generator().manual_seed(tokens))
    for start, end in [(0, tokens), *((t, t + 1) for t in range(tokens, tokens + 12))]:
        want = theirs(x[None, start:end], cache_params=cache)[0]
        got = ours(backend, x[start:end], has_initial_state=start > 0, step=start > 0)
        assert relative_error(got, want) < 2e-5
        assert (got - want).abs().max() < 1e-4
