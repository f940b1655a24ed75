"""Writes a small Kimi Linear checkpoint with random weights, in the original layout and config keys.

    python -m vllm_kimi_linear.demo --out DIR

It is for tests and trials: every part of the model contributes to the logits, the gates cover their whole range
(docs/kda.md section 3), and the same seed gives the same bytes.
"""

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kimi_linear.config.model import Geometry
from vllm_kimi_linear.config.tensors import weights as tensors_of
from vllm_kimi_linear.demo_tokenizer import (
    Vocabulary,
    build_vocabulary,
    write_fast_tokenizer,
    write_remote_tokenizer,
)

if TYPE_CHECKING:
    import torch

DEMO: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 512,
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 4,
    "num_expert_group": 1,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 1024,
    "linear_attn_config": {"head_dim": 64, "num_heads": 4, "short_conv_kernel_size": 4},
}

# The layer sizes of the 48B with few layers and experts: 723 M parameters.
BENCH = DEMO | {
    "head_dim": 72,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_token": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 32,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 32768,
    "linear_attn_config": {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
}


def _every_fourth(layers: int) -> list[int]:
    return [n for n in range(1, layers + 1) if n % 4 == 0]


@dataclass(frozen=True)
class Preset:
    config: dict[str, Any]
    full_attn_layers: Callable[[int], list[int]]  # number of layers -> 1-based MLA layers


PRESETS = {
    "demo": Preset(DEMO, _every_fourth),
    "bench": Preset(BENCH, _every_fourth),
    "all-mla": Preset(DEMO | {"num_hidden_layers": 4}, lambda n: list(range(1, n + 1))),
    "one-mla": Preset(DEMO | {"num_hidden_layers": 4}, lambda n: [n]),
    "dense": Preset(DEMO | {"num_hidden_layers": 4, "num_experts": None, "num_experts_per_token": None}, _every_fourth),
}


def demo_config(preset: str = "demo", layers: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a preset, with the original checkpoint's keys.

    Raises ValueError if `layers` is too small for an MLA layer.
    """
    chosen = PRESETS[preset]
    count = chosen.config["num_hidden_layers"] if layers is None else layers
    full = chosen.full_attn_layers(count)
    if count < 1 or not full:
        raise ValueError(f"--layers is {count}; preset {preset} needs enough layers to have an MLA layer among them")
    vocabulary = build_vocabulary(chosen.config["vocab_size"])
    config = chosen.config | {
        "dtype": dtype,
        "num_hidden_layers": count,
        "bos_token_id": vocabulary.special_id("[BOS]"),
        "eos_token_id": vocabulary.special_id("<|im_end|>"),
        "pad_token_id": vocabulary.special_id("[PAD]"),
        "linear_attn_config": chosen.config["linear_attn_config"]
        | {"full_attn_layers": full, "kda_layers": [n for n in range(1, count + 1) if n not in full]},
    }
    if config["num_experts"] is None:
        config["first_k_dense_replace"] = count
    return dict(sorted(config.items()))


# What a run may leave in its folder, so that the next run there can replace it.
WRITTEN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "tokenization_kimi.py",
    "configuration_kimi.py",
    "modeling_kimi.py",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


class Weights:
    """Random tensors by checkpoint name; each depends on the seed, its name and its shape, and on nothing else."""

    # RMS of the residual stream where it starts. So small that the norms' epsilon matters.
    STREAM = 0.01

    def __init__(self, config: dict[str, Any], vocabulary: Vocabulary, seed: int, dtype: str) -> None:
        import torch

        self.config = config
        self.vocabulary = vocabulary
        self.seed = seed
        self.dtype: torch.dtype = getattr(torch, dtype)

    def _rng(self, name: str) -> Any:
        import numpy

        return numpy.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _normal(self, name: str, *shape: int) -> "torch.Tensor":
        import numpy
        import torch

        return torch.from_numpy(self._rng(name).standard_normal(shape, dtype=numpy.float32))

    def _uniform(self, name: str, low: float, high: float, *shape: int) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self._rng(name).uniform(low, high, shape)).float()

    def _linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> tuple[str, "torch.Tensor"]:
        """A matrix [rows, columns] that maps unit-variance input to outputs of standard deviation `gain`."""
        weight = self._normal(name, rows, columns).mul_(gain / math.sqrt(columns))
        return name + ".weight", weight.to(self.dtype)

    def _norm(self, name: str, size: int) -> tuple[str, "torch.Tensor"]:
        return name + ".weight", self._uniform(name, 0.5, 1.5, size).to(self.dtype)

    def __iter__(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yields (name, tensor) in checkpoint order."""
        c = self.config
        hidden, vocab = c["hidden_size"], c["vocab_size"]
        embedding = self._normal("model.embed_tokens", vocab, hidden).mul_(self.STREAM)
        yield "model.embed_tokens.weight", embedding.to(self.dtype)
        for index in range(c["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            yield self._norm(f"{layer}.input_layernorm", hidden)
            mla = index + 1 in c["linear_attn_config"]["full_attn_layers"]
            yield from (self._mla if mla else self._kda)(f"{layer}.self_attn")
            yield self._norm(f"{layer}.post_attention_layernorm", hidden)
            if index < c["first_k_dense_replace"]:
                yield from self._mlp(f"{layer}.mlp", c["intermediate_size"], 0.4 * self.STREAM)
            else:
                yield from self._moe(f"{layer}.block_sparse_moe")
        yield self._norm("model.norm", hidden)
        yield self._head()

    def _kda(self, at: str) -> Iterator[tuple[str, "torch.Tensor"]]:
        import torch

        c, linear = self.config, self.config["linear_attn_config"]
        hidden, heads, dim = c["hidden_size"], linear["num_heads"], linear["head_dim"]
        taps, size = linear["short_conv_kernel_size"], heads * dim
        for part in "qkv":
            yield self._linear(f"{at}.{part}_proj", size, hidden)
            conv = self._normal(f"{at}.{part}_conv1d", size, 1, taps).mul_(0.7)
            yield f"{at}.{part}_conv1d.weight", conv.to(self.dtype)
        # Heads run from slow (A = 1, z nearly its bias) to fast (A = 16, z of wide spread), in an order that
        # changes with the layer so that no mix-up of heads goes unseen.
        speed = torch.linspace(0, 1, heads)[torch.from_numpy(self._rng(f"{at}.order").permutation(heads))]
        yield f"{at}.A_log", (speed * math.log(16)).view(1, 1, heads, 1)
        dt = self._uniform(f"{at}.dt_bias", math.log(1e-3), math.log(1e-1), size).exp()
        yield f"{at}.dt_bias", dt + torch.log(-torch.expm1(-dt))
        yield self._linear(f"{at}.f_a_proj", dim, hidden)
        spread = (0.7 + 1.3 * speed).repeat_interleave(dim)
        forget = self._normal(f"{at}.f_b_proj", size, dim).mul_(spread[:, None] / math.sqrt(dim))
        yield f"{at}.f_b_proj.weight", forget.to(self.dtype)
        yield self._linear(f"{at}.b_proj", heads, hidden, gain=3.0)
        yield self._linear(f"{at}.g_a_proj", dim, hidden)
        yield self._linear(f"{at}.g_b_proj", size, dim, gain=2.0)
        yield self._norm(f"{at}.o_norm", dim)
        yield self._linear(f"{at}.o_proj", hidden, size, gain=self.STREAM)

    def _mla(self, at: str) -> Iterator[tuple[str, "torch.Tensor"]]:
        c = self.config
        hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
        nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        yield self._linear(f"{at}.q_proj", heads * (nope + rope), hidden, gain=2.0)
        down = self._normal(f"{at}.kv_a_proj_with_mqa", latent + rope, hidden).div_(math.sqrt(hidden))
        # The latent is normalised, so it may be small: then the norm's epsilon, 1e-6, matters.
        down[:latent] *= 0.004
        yield f"{at}.kv_a_proj_with_mqa.weight", down.to(self.dtype)
        yield self._norm(f"{at}.kv_a_layernorm", latent)
        yield self._linear(f"{at}.kv_b_proj", heads * (nope + value), latent)
        yield self._linear(f"{at}.o_proj", hidden, heads * value, gain=self.STREAM)

    def _mlp(self, at: str, width: int, gain: float) -> Iterator[tuple[str, "torch.Tensor"]]:
        hidden = self.config["hidden_size"]
        yield self._linear(f"{at}.gate_proj", width, hidden, gain=1.5)
        yield self._linear(f"{at}.up_proj", width, hidden, gain=1.5)
        yield self._linear(f"{at}.down_proj", hidden, width, gain=gain)

    def _moe(self, at: str) -> Iterator[tuple[str, "torch.Tensor"]]:
        import torch

        c = self.config
        hidden, width, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
        yield self._linear(f"{at}.gate", experts, hidden, gain=1.5)
        # As wide as the scores' own spread, so that it often decides. On the bfloat16 grid: then it is the same
        # number whatever dtype the model is loaded in.
        bias = self._normal(f"{at}.gate.bias", experts).mul_(0.25)
        yield f"{at}.gate.e_score_correction_bias", bias.to(torch.bfloat16).float()
        for expert in range(experts):
            name = f"{at}.experts.{expert}"
            yield self._linear(f"{name}.w1", width, hidden, gain=1.5)
            yield self._linear(f"{name}.w2", hidden, width, gain=0.25 * self.STREAM)
            yield self._linear(f"{name}.w3", width, hidden, gain=1.5)
        yield from self._mlp(f"{at}.shared_experts", width * c["num_shared_experts"], 0.4 * self.STREAM)

    def _head(self) -> tuple[str, "torch.Tensor"]:
        """The output matrix, with control tokens, control characters and parts of characters made unlikely."""
        c = self.config
        name, weight = self._linear("lm_head", c["vocab_size"], c["hidden_size"], gain=3.5)
        tokens, ends = self.vocabulary.tokens, ("[EOS]", "<|im_end|>")
        text = {*range(0x20, 0x7F), ord("\n"), ord("\t")}
        quiet = [i for i, token in enumerate(tokens) if len(token) == 1 and token[0] not in text]
        quiet += [self.vocabulary.special_id(s) for s in self.vocabulary.specials if s not in ends]
        weight[quiet] *= 0.25
        return name, weight


def write_checkpoint(
    folder: Path,
    preset: str = "demo",
    *,
    seed: int = 0,
    layers: int | None = None,
    dtype: str = "bfloat16",
    shards: int = 1,
    remote_code: bool = False,
) -> int:
    """Writes config, tokenizer and weights into `folder` and returns the number of parameters.

    Files that another run left there are replaced, not kept. Raises ValueError for options that do not fit.
    """
    config = demo_config(preset, layers, dtype)
    tensors = sum(1 for _ in tensors_of(Geometry.from_config(config)))
    if not 1 <= shards <= tensors:
        raise ValueError(f"--shards is {shards}; this checkpoint has {tensors} tensors, give 1 to that many")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; give a number from 0")
    vocabulary = build_vocabulary(config["vocab_size"])
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN:
        for old in folder.glob(pattern):
            old.unlink()
    if remote_code:
        write_remote_tokenizer(vocabulary, folder)
        config["auto_map"] = {
            "AutoConfig": "configuration_kimi.KimiLinearConfig",
            "AutoModel": "modeling_kimi.KimiLinearModel",
            "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
        }
        for name in ("configuration_kimi.py", "modeling_kimi.py"):
            code = resources.files("vllm_kimi_linear.demo_remote") / name
            (folder / name).write_text(code.read_text())
    else:
        write_fast_tokenizer(vocabulary, folder)
    ends = [vocabulary.special_id("<|im_end|>"), vocabulary.special_id("[EOS]")]
    special = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special | {"eos_token_id": ends})
    count = _write_weights(folder, Weights(config, vocabulary, seed, dtype), shards)
    _write_json(folder / "config.json", config)  # last: a folder with a config is complete
    return count


def _write_weights(folder: Path, weights: Weights, shards: int) -> int:
    from safetensors.torch import save_file

    tensors = dict(weights)
    names = list(tensors)
    where: dict[str, str] = {}
    for index in range(shards):
        part = names[len(names) * index // shards : len(names) * (index + 1) // shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file's own mode keeps other users, such as a container's, out
        where |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return sum(t.numel() for t in tensors.values())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_kimi_linear.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="sizes and layout (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers (default: the preset's)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="weight files to split into (default: 1)")
    parser.add_argument(
        "--remote-code", action="store_true", help="tiktoken files and custom code, for --trust-remote-code"
    )
    args = parser.parse_args(argv)
    try:
        count = write_checkpoint(
            args.out,
            args.preset,
            seed=args.seed,
            layers=args.layers,
            dtype=args.dtype,
            shards=args.shards,
            remote_code=args.remote_code,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {count / 1e6:.1f} M parameters, preset {args.preset}, seed {args.seed}")


if __name__ == "__main__":
    main()
