"""The demo checkpoint: loads in transformers, is the same every time, and gives wrong implementations away."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_kimi_linear import demo
from vllm_kimi_linear.oracle import Oracle


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads only wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle(demo_model: Path) -> Oracle:
    return Oracle(demo_model)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """160 random tokens: more than two chunks of the reference's chunk form."""
    return random.Random(0).choices(range(1024), k=160)


@pytest.fixture(scope="module")
def right(oracle: Oracle, ids: list[int]) -> torch.Tensor:
    return oracle.logits(ids)


# The checkpoint as files.


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 3},
        {"preset": "all-mla", "layers": 2},
        {"preset": "one-mla", "dtype": "float32"},
        {"preset": "dense"},
        {"layers": 5, "seed": 7},
    ],
)
def test_transformers_loads_every_layout(options: dict[str, Any], ids: list[int], tmp_path: Path):
    demo.write_checkpoint(tmp_path, **options)
    logits = Oracle(tmp_path).logits(ids[:70])
    assert logits.isfinite().all()


def test_shards_hold_the_same_tensors(demo_model: Path, tmp_path: Path):
    from safetensors.torch import load_file

    demo.main(["--out", str(tmp_path), "--shards", "3"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    whole = load_file(demo_model / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())


def test_same_seed_same_bytes(demo_model: Path, tmp_path: Path):
    demo.main(["--out", str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in demo_model.iterdir()}
    assert sum(map(len, written.values())) < 13e6
    demo.main(["--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "model.safetensors").read_bytes() != written["model.safetensors"]


def test_original_dtypes_and_shapes(demo_model: Path):
    from safetensors.torch import load_file

    tensors = load_file(demo_model / "model.safetensors")
    at = "model.layers.0.self_attn"
    assert tensors[f"{at}.A_log"].shape == (1, 1, 4, 1)
    assert tensors[f"{at}.q_conv1d.weight"].shape == (256, 1, 4)
    fp32 = {name.rpartition(".")[2] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias", "e_score_correction_bias"}
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.bfloat16}


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path: Path):
    (tmp_path / "notes.json").write_text("{}")
    demo.write_checkpoint(tmp_path, "dense", shards=2, remote_code=True)
    demo.write_checkpoint(tmp_path, "dense")
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layers", "3"], "--layers is 3"),
        (["--preset", "one-mla", "--layers", "0"], "--layers is 0"),
        (["--shards", "0"], "--shards is 0"),
        (["--shards", "100000"], "--shards is 100000"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_options_that_do_not_fit(options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        demo.main(["--out", str(out), *options])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


# The weights as a test instrument.


def test_logits_are_not_flat_and_answers_no_loop(oracle: Oracle, ids: list[int]):
    answer = oracle.greedy(ids[:40], 150)
    assert len(set(answer)) > 75
    assert len(set(answer[-50:])) > 25
    best = torch.tensor([max(top.values()) for top in oracle.score(ids[:40], answer).top]).exp()
    assert best.min() < 0.2 and best.max() > 0.8 and 0.2 < best.median() < 0.6


def test_gates_cover_their_range(oracle: Oracle, ids: list[int]):
    decays, betas = [], []
    hooks = []
    for layer in oracle.model.model.layers:
        if hasattr(layer.self_attn, "forget_gate"):
            mixer = layer.self_attn
            hooks.append(mixer.forget_gate.register_forward_hook(lambda _, __, out: decays.append(-out)))
            hooks.append(mixer.b_proj.register_forward_hook(lambda _, __, out: betas.append(out.sigmoid())))
            rates = mixer.forget_gate.A_log.detach().exp()
            assert (rates.min().item(), rates.max().item()) == pytest.approx((1, 16))
            dt = torch.nn.functional.softplus(mixer.forget_gate.dt_bias.detach())
            assert 0.999e-3 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
    oracle.logits(ids)
    for hook in hooks:
        hook.remove()
    assert len(decays) == 6
    for decay, beta in zip(decays, betas, strict=True):
        assert decay.min() < 1e-4
        assert 40 < decay.max() < 150
        heads = decay.mean(dim=(0, 1, 3))
        assert heads.min() < 0.05 and heads.max() > 1  # one head remembers, one forgets at once
        assert beta.min() < 0.02 and beta.max() > 0.95


def test_the_router_bias_decides_often(oracle: Oracle, ids: list[int]):
    changed, routers = [], [layer.mlp.gate for layer in oracle.model.model.layers[1:]]

    def compare(router: Any, _: Any, out: Any) -> None:
        unbiased = out[0].sigmoid().topk(router.top_k).indices.sort().values
        changed.append((unbiased != out[2].sort().values).any(-1).float().mean().item())

    hooks = [router.register_forward_hook(compare) for router in routers]
    oracle.logits(ids)
    for hook in hooks:
        hook.remove()
    assert len(changed) == 7
    assert min(changed) > 0.15 and sum(changed) / 7 > 0.3


def _each(part: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """`change` applied to every module of a kind: the KDA mixers, the MLA mixers, the experts or the layers."""

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


def _bounded_gate(mixer: Any) -> None:
    """The successor model's gate: -5 sigmoid(exp(A_log) z)."""
    gate = mixer.forget_gate

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        z = (gate.f_b_proj(gate.f_a_proj(hidden)) + gate.dt_bias).view(*hidden.shape[:2], -1, gate.head_dim)
        return -5 * (gate.A_log.exp() * z).sigmoid()

    gate.forward = forward


def _clamped_gate(mixer: Any) -> None:
    gate, exact = mixer.forget_gate, mixer.forget_gate.forward
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
    "conv taps reversed": _each("kda", lambda m: m.conv1d.weight.copy_(m.conv1d.weight.flip(-1))),
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
def test_wrong_implementations_differ(mutation: str, oracle: Oracle, ids: list[int], right: torch.Tensor):
    """By far more than the 1e-4 within which the server's logprobs must agree."""
    mutant = copy.copy(oracle)
    mutant.model = copy.deepcopy(oracle.model)
    with torch.no_grad():
        MUTATIONS[mutation](mutant.model)
    wrong = mutant.logits(ids)
    likely = right.log_softmax(-1).topk(5).indices
    difference = (wrong.log_softmax(-1) - right.log_softmax(-1)).gather(1, likely).abs()
    assert difference.max() > 0.02
    flipped = (wrong.argmax(-1) != right.argmax(-1)).float().mean()
    assert mutation in SMALL or flipped > 0.1


# The reference's own account of an answer.


def test_score_is_what_greedy_decoding_does(oracle: Oracle, ids: list[int]):
    prompt = ids[:40]
    answer = oracle.greedy(prompt, 20)
    score = oracle.score(prompt, answer)
    assert score.agrees and score.argmax == answer
    assert [max(top, key=lambda token: top[token]) for top in score.top] == answer
    assert score.logprobs == [max(top.values()) for top in score.top]
    logprobs = oracle.logits([*prompt, *answer])[39:-1].log_softmax(-1)
    assert score.logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)
    first, second = logprobs.topk(2).values.unbind(-1)
    assert score.margin == pytest.approx((first - second).min().item(), abs=1e-4)

    wrong = [*answer[:10], (answer[10] + 1) % 1024, *answer[11:]]
    assert oracle.score(prompt, wrong).argmax[:11] == answer[:11]
    assert not oracle.score(prompt, wrong).agrees


def test_end_tokens_do_not_end_greedy(demo_model: Path):
    oracle = Oracle(demo_model)
    end = oracle.model.generation_config.eos_token_id[0]
    raised = torch.zeros(1024).index_fill(0, torch.tensor(end), 1000.0)
    oracle.model.lm_head.register_forward_hook(lambda _, __, logits: logits + raised)
    assert oracle.greedy([1, 2, 3], 5) == [end] * 5


def test_ties_are_not_well_posed(oracle: Oracle, ids: list[int]):
    prompt = ids[:16]
    answer = oracle.greedy(prompt, 8)
    score = oracle.score(prompt, answer)
    assert oracle.well_posed(prompt, answer, score.margin / 2, score.router_gap / 2)
    assert not oracle.well_posed(prompt, answer, score.margin * 2, score.router_gap / 2)
    assert not oracle.well_posed(prompt, answer, score.margin / 2, score.router_gap * 2)

    tied = copy.copy(oracle)
    tied.model = copy.deepcopy(oracle.model)
    other = next(token for token in range(1000) if token not in answer)
    with torch.no_grad():
        tied.model.lm_head.weight[other] = tied.model.lm_head.weight[answer[3]]
        gate = tied.model.model.layers[2].mlp.gate
        gate.weight[1], gate.e_score_correction_bias[:] = gate.weight[0], 0
    assert tied.score(prompt, answer).margin < 1e-5
    with torch.no_grad():
        gate.e_score_correction_bias[:2] = 0.3  # two equal experts that some row ranks second and third
    assert tied.score(prompt, answer).router_gap < 1e-6


# Remote code.


def test_remote_code_is_what_auto_map_names(remote_model: Path, ids: list[int], right: torch.Tensor):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(remote_model, trust_remote_code=True)
    assert type(config).__module__.endswith("configuration_kimi")
    assert [config.is_kda_layer(i) for i in range(4)] == [True, True, True, False]
    assert config.num_experts_per_token == 2
    model = AutoModelForCausalLM.from_pretrained(remote_model, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__.endswith("modeling_kimi")
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([ids])).logits[0], right)
    assert not (remote_model / "tokenizer.json").exists()
