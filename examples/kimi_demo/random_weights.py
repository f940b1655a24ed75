"""Random weights in the original layout, made so that a wrong implementation of any part of the model shows."""

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kimi_demo.tokenizer import Vocabulary

if TYPE_CHECKING:
    import torch


class RandomWeights:
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
        kernel_size, size = linear["short_conv_kernel_size"], heads * dim
        for part in "qkv":
            yield self._linear(f"{at}.{part}_proj", size, hidden)
            conv = self._normal(f"{at}.{part}_conv1d", size, 1, kernel_size).mul_(0.7)
            yield f"{at}.{part}_conv1d.weight", conv.to(self.dtype)
        # Heads run from slow (A = 1, z nearly its bias) to fast (A = 16, z of wide spread), in an order that
        # changes with the layer so that no mix-up of heads goes unseen.
        speed = torch.linspace(0, 1, heads)[torch.from_numpy(self._rng(f"{at}.order").permutation(heads))]
        yield f"{at}.A_log", (speed * math.log(16)).view(1, 1, heads, 1)
        dt = self._uniform(f"{at}.dt_bias", math.log(1e-3), math.log(1e-1), size).exp()
        yield f"{at}.dt_bias", dt + torch.log(-torch.expm1(-dt))
        yield self._linear(f"{at}.f_a_proj", dim, hidden)
        spread = (0.7 + 1.3 * speed).repeat_interleave(dim)
        f_b = self._normal(f"{at}.f_b_proj", size, dim).mul_(spread[:, None] / math.sqrt(dim))
        yield f"{at}.f_b_proj.weight", f_b.to(self.dtype)
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
