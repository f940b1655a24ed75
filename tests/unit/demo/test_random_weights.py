"""The demo's weights as a test instrument: they give every wrong implementation away."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kimi_demo.reference import HfReference


def test_logits_are_not_flat_and_answers_no_loop(reference: HfReference, ids: list[int]):
    answer = reference.greedy(ids[:40], 150)
    assert len(set(answer)) > 75
    assert len(set(answer[-50:])) > 25
    best = torch.tensor([max(top.values()) for top in reference.score(ids[:40], answer).top]).exp()
    assert best.min() < 0.2 and best.max() > 0.8 and 0.2 < best.median() < 0.6


def test_gates_cover_their_range(reference: HfReference, ids: list[int]):
    decays, betas = [], []
    hooks = []
    for layer in reference.model.model.layers:
        if hasattr(layer.self_attn, "forget_gate"):
            kda = layer.self_attn
            hooks.append(kda.forget_gate.register_forward_hook(lambda _, __, out: decays.append(-out)))
            hooks.append(kda.b_proj.register_forward_hook(lambda _, __, out: betas.append(out.sigmoid())))
            rates = kda.forget_gate.A_log.detach().exp()
            assert (rates.min().item(), rates.max().item()) == pytest.approx((1, 16))
            dt = torch.nn.functional.softplus(kda.forget_gate.dt_bias.detach())
            assert 0.999e-3 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
    reference.logits(ids)
    for hook in hooks:
        hook.remove()
    assert len(decays) == 6
    for decay, beta in zip(decays, betas, strict=True):
        assert decay.min() < 1e-4
        assert 40 < decay.max() < 150
        heads = decay.mean(dim=(0, 1, 3))
        assert heads.min() < 0.05 and heads.max() > 1  # one head remembers, one forgets at once
        assert beta.min() < 0.02 and beta.max() > 0.95


def test_the_router_bias_decides_often(reference: HfReference, ids: list[int]):
    changed, routers = [], [layer.mlp.gate for layer in reference.model.model.layers[1:]]

    def compare(router: Any, _: Any, out: Any) -> None:
        unbiased = out[0].sigmoid().topk(router.top_k).indices.sort().values
        changed.append((unbiased != out[2].sort().values).any(-1).float().mean().item())

    hooks = [router.register_forward_hook(compare) for router in routers]
    reference.logits(ids)
    for hook in hooks:
        hook.remove()
    assert len(changed) == 7
    assert min(changed) > 0.15 and sum(changed) / 7 > 0.3


def _each(part: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """`change` applied to every module of a kind: KDA, MLA, the experts or the layers."""

    def modules(model: Any) -> Iterator[Any]:
        for layer in model.model.layers:
            if part == "layer":
                yield layer
            elif part == "moe" and hasattr(layer.mlp, "experts"):
                yield layer.mlp
            elif part == ("kda" if hasattr(layer.self_attn, "forget_gate") else "mla"):
                yield layer.self_attn

    def mutate(model: Any) -> None:
        found = list(modules(model))
        assert found
        for module in found:
            change(module)

    return mutate


def _bias_in_the_weights(moe: Any) -> None:
    gate = moe.gate

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.view(-1, gate.hidden_dim), gate.weight)
        best = (logits.sigmoid() + gate.e_score_correction_bias).topk(gate.top_k)
        weights = best.values / best.values.sum(-1, keepdim=True) * gate.routed_scaling_factor
        return logits, weights, best.indices

    gate.forward = forward


def _bounded_gate(kda: Any) -> None:
    """The successor model's gate: -5 sigmoid(exp(A_log) z)."""
    gate = kda.forget_gate

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        z = (gate.f_b_proj(gate.f_a_proj(hidden)) + gate.dt_bias).view(*hidden.shape[:2], -1, gate.head_dim)
        return -5 * (gate.A_log.exp() * z).sigmoid()

    gate.forward = forward


def _clamped_gate(kda: Any) -> None:
    gate, exact = kda.forget_gate, kda.forget_gate.forward
    gate.forward = lambda hidden: exact(hidden).clamp_min(-5)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute, such as `o_norm.variance_epsilon`."""

    def change(module: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            module = getattr(module, owner)
        assert getattr(module, name) != value
        setattr(module, name, value)

    return change


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "A_log missing": _each("kda", lambda m: m.forget_gate.A_log.zero_()),
    "A_log of the next head": _each("kda", lambda m: m.forget_gate.A_log.copy_(m.forget_gate.A_log.roll(1, 2))),
    "dt_bias missing": _each("kda", lambda m: m.forget_gate.dt_bias.zero_()),
    "gate of the successor": _each("kda", _bounded_gate),
    "gate bounded at -5": _each("kda", _clamped_gate),
    "beta missing": _each("kda", lambda m: m.b_proj.weight.zero_()),
    "conv kernel reversed": _each("kda", lambda m: m.conv1d.weight.copy_(m.conv1d.weight.flip(-1))),
    "conv order k|q|v": _each("kda", lambda m: m.conv1d.weight.copy_(_swap_q_and_k(m.conv1d.weight))),
    "o_norm eps": _each("kda", _set("o_norm.variance_epsilon", 1e-6)),
    "o_norm weight missing": _each("kda", lambda m: m.o_norm.weight.fill_(1)),
    "output gate silu": _each("kda", _set("o_norm.activation", "silu")),
    "input norm eps": _each("layer", _set("input_layernorm.variance_epsilon", 1e-6)),
    "post-attention norm eps": _each("layer", _set("post_attention_layernorm.variance_epsilon", 1e-6)),
    "final norm eps": _set("model.norm.variance_epsilon", 1e-6),
    "latent norm eps": _each("mla", _set("kv_a_layernorm.variance_epsilon", 1e-5)),
    "shared key part missing": _each("mla", lambda m: m.kv_a_proj_with_mqa.weight[512:].zero_()),
    "attention scale": _each("mla", _set("scaling", 64**-0.5)),
    "router bias missing": _each("moe", lambda m: m.gate.e_score_correction_bias.zero_()),
    "router bias in the weights": _each("moe", _bias_in_the_weights),
    "renormalisation missing": _each("moe", _set("gate.norm_topk_prob", False)),
    "routed scaling missing": _each("moe", _set("gate.routed_scaling_factor", 1.0)),
    "shared expert missing": _each("moe", lambda m: m.shared_experts.down_proj.weight.zero_()),
    "w1 and w3 swapped": _each(
        "moe", lambda m: m.experts.gate_up_proj.copy_(m.experts.gate_up_proj.roll(m.experts.intermediate_dim, 1))
    ),
}
# So small that the logits show it, but no token of a short text.
SMALL = {"gate bounded at -5", "final norm eps"}


def _swap_q_and_k(weight: torch.Tensor) -> torch.Tensor:
    q, k, v = weight.chunk(3)
    return torch.cat([k, q, v])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_implementations_differ(mutation: str, reference: HfReference, ids: list[int], right: torch.Tensor):
    """By far more than the 1e-4 within which the server's logprobs must agree."""
    mutant = copy.copy(reference)
    mutant.model = copy.deepcopy(reference.model)
    with torch.no_grad():
        MUTATIONS[mutation](mutant.model)
    wrong = mutant.logits(ids)
    likely = right.log_softmax(-1).topk(5).indices
    difference = (wrong.log_softmax(-1) - right.log_softmax(-1)).gather(1, likely).abs()
    assert difference.max() > 0.02
    flipped = (wrong.argmax(-1) != right.argmax(-1)).float().mean()
    assert mutation in SMALL or flipped > 0.1
