"""Weights as checkpoints hold them: plain tensors in fp32 or bf16, or fewer bits and scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

INT4_ZERO = 8  # what a stored 4-bit integer is above its value


@dataclass(frozen=True)
class QuantizedWeight:
    """[..., N, K]: what is stored, times its scales.

    values: float8_e4m3fn or int8 [..., N, K]; or int32 [..., N, K / 8], each with eight 4-bit integers above -8, the
    first in its lowest bits. scales: fp32 or bf16 [..., ceil(N / rows), G], those of row n for columns k are at n //
    rows and k // group; `group` is a power of two of 16 or more, and at least K where a row has one scale. All
    contiguous. Raises ValueError for any other.
    """

    values: Tensor
    scales: Tensor
    group: int
    rows: int = 1

    def __post_init__(self) -> None:
        if self.values.dtype not in (torch.float8_e4m3fn, torch.int8, torch.int32):
            raise ValueError(
                f"values are {self.values.dtype}; give float8_e4m3fn, int8, or int32 of eight integers each"
            )
        floats = self.scales.dtype in (torch.float32, torch.bfloat16)
        if not (floats and self.scales.is_contiguous() and self.values.is_contiguous()):
            raise ValueError("give contiguous values and scales, scales in float32 or bfloat16")
        if self.group < 16 or self.group & (self.group - 1):
            raise ValueError(f"group is {self.group}; give a power of two from 16")
        *outer, rows, columns = self.shape
        wanted = (*outer, -(-rows // self.rows), -(-columns // self.group))
        if tuple(self.scales.shape) != wanted:
            raise ValueError(f"scales have shape {list(self.scales.shape)}; give {list(wanted)}")

    @property
    def shape(self) -> tuple[int, ...]:
        packed = 8 if self.values.dtype == torch.int32 else 1
        return (*self.values.shape[:-1], self.values.shape[-1] * packed)

    def __len__(self) -> int:
        return self.shape[0]

    def float(self) -> Tensor:
        """In fp32, [..., N, K]."""
        values = self.values
        if values.dtype == torch.int32:
            places = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
            values = ((values[..., None] >> places) & 15).flatten(-2) - INT4_ZERO
        scales = self.scales.float()
        if self.rows > 1:
            scales = scales.repeat_interleave(self.rows, -2)[..., : self.shape[-2], :]
        if scales.shape[-1] > 1:
            scales = scales.repeat_interleave(self.group, -1)[..., : self.shape[-1]]
        return values.float() * scales

    def __getitem__(self, index: Tensor | int | slice) -> "QuantizedWeight":
        """Along the first dimension; of rows, where each has scales of its own."""
        return QuantizedWeight(self.values[index].contiguous(), self.scales[index].contiguous(), self.group, self.rows)


Weight = Tensor | QuantizedWeight
