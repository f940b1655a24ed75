"""Problems of the sizes that are timed: random inputs at trained scale, views as the model makes them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState, PrefillArgs, SpecDecodeArgs


@dataclass
class Case:
    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    cu_seqlens: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    out: Tensor

    def decode(self, backend: ModuleType, state_indices: Tensor) -> None:
        backend.decode(DecodeArgs(self.inputs, self.params, self.state, state_indices, self.out))

    def prefill(self, backend: ModuleType) -> None:
        table = (self.cu_seqlens, self.state_indices, self.has_initial_state)
        backend.prefill(PrefillArgs(self.inputs, self.params, self.state, *table, self.out))

    def spec_decode(
        self, backend: ModuleType, cu_seqlens: Tensor, state_indices: Tensor, num_accepted_tokens: Tensor
    ) -> None:
        table = (cu_seqlens, state_indices, num_accepted_tokens)
        backend.spec_decode(SpecDecodeArgs(self.inputs, self.params, self.state, *table, self.out))


def make(
    lengths: list[int],
    heads: int,
    dim: int = 128,
    conv_kernel_size: int = 4,
    states: int | None = None,
    state_dtype: torch.dtype = torch.float32,
    has_initial_state: bool = False,
    device: str = "cuda",
    seed: int = 0,
) -> Case:
    """bf16 inputs; q|k|v, beta and the two low-rank halves are views of one buffer, as the model's GEMM leaves them."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, width, sequences = sum(lengths), heads * dim, len(lengths)
    states = states or sequences + 1
    options: Any = {"device": device, "generator": generator}
    bf16 = torch.bfloat16
    packed = torch.empty(tokens, 3 * width + heads + 2 * dim, dtype=bf16, device=device)
    for begin in range(0, tokens, 65536):
        part = packed[begin : begin + 65536]
        part.copy_(torch.randn(part.shape, **options))
    g, output_gate = (torch.empty(tokens, width, dtype=bf16, device=device) for _ in range(2))
    for tensor in (g, output_gate):
        for begin in range(0, tokens, 65536):
            tensor[begin : begin + 65536].copy_(torch.randn(tensor[begin : begin + 65536].shape, **options))
    params = KdaParams(
        conv_weight=torch.randn(3 * width, conv_kernel_size, **options) * 0.5,
        A_log=torch.rand(heads, **options).mul(15).add(1).log(),
        dt_bias=torch.rand(width, **options).mul(8).sub(7),
        norm_weight=(1 + 0.1 * torch.randn(dim, **options)).to(bf16),
        norm_eps=1e-5,
    )
    state = KdaState(
        torch.randn(states, conv_kernel_size - 1, 3 * width, **options).to(bf16),
        torch.empty(states, heads, dim, dim, dtype=state_dtype, device=device),
    )
    state.recurrent.copy_(torch.randn(heads, dim, dim, **options))  # the same for all sequences: random, and quick
    return Case(
        KdaInputs(packed[:, : 3 * width], g, packed[:, 3 * width : 3 * width + heads], output_gate),
        params,
        state,
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        torch.randperm(states - 1, **options)[:sequences].add(1).to(torch.int32),
        torch.full((sequences,), has_initial_state, device=device),
        torch.empty(tokens, width, dtype=bf16, device=device),
    )
