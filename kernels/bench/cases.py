"""Problems of the sizes that are timed: random rows at trained scale, views as the model makes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kda_kernels.types import KdaInputs, KdaParams, KdaState


@dataclass
class Case:
    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    cu_seqlens: Tensor
    slots: Tensor
    resume: Tensor
    out: Tensor

    def prefill(self, backend, **options) -> None:
        backend.prefill(
            self.inputs, self.params, self.state, self.cu_seqlens, self.slots, self.resume, self.out, **options
        )


def make(
    lengths: list[int],
    heads: int,
    dim: int = 128,
    taps: int = 4,
    slots: int | None = None,
    state_dtype: torch.dtype = torch.float32,
    resume: bool = False,
    device: str = "cuda",
    seed: int = 0,
) -> Case:
    """bf16 rows; q|k|v, beta and the two low-rank halves are views of one buffer, as the model's GEMM leaves them."""
    make = torch.Generator(device).manual_seed(seed)
    rows, width, sequences = sum(lengths), heads * dim, len(lengths)
    slots = slots or sequences + 1
    options = {"device": device, "generator": make}
    bf16 = torch.bfloat16
    packed = torch.empty(rows, 3 * width + heads + 2 * dim, dtype=bf16, device=device)
    for begin in range(0, rows, 65536):
        part = packed[begin : begin + 65536]
        part.copy_(torch.randn(part.shape, **options))
    forget, gate = (torch.empty(rows, width, dtype=bf16, device=device) for _ in range(2))
    for tensor in (forget, gate):
        for begin in range(0, rows, 65536):
            tensor[begin : begin + 65536].copy_(torch.randn(tensor[begin : begin + 65536].shape, **options))
    params = KdaParams(
        conv_weight=torch.randn(3 * width, taps, **options) * 0.5,
        a_log=torch.rand(heads, **options).mul(15).add(1).log(),
        dt_bias=torch.rand(width, **options).mul(8).sub(7),
        norm_weight=(1 + 0.1 * torch.randn(dim, **options)).to(bf16),
        norm_eps=1e-5,
    )
    state = KdaState(
        torch.randn(slots, taps - 1, 3 * width, **options).to(bf16),
        torch.empty(slots, heads, dim, dim, dtype=state_dtype, device=device),
    )
    state.recurrent.copy_(torch.randn(heads, dim, dim, **options))  # the same in all slots: random, and quick
    return Case(
        KdaInputs(packed[:, : 3 * width], forget, packed[:, 3 * width : 3 * width + heads], gate),
        params,
        state,
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        torch.randperm(slots - 1, **options)[:sequences].add(1).to(torch.int32),
        torch.full((sequences,), resume, device=device),
        torch.empty(rows, width, dtype=bf16, device=device),
    )
