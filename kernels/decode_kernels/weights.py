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


@dataclass(frozen=True)
class Tiles:
    """Matrices [E, N, K] of 4-bit integers above -8, in the order in which tensor cores take them, and their scales.

    values: int32 [E, K / 16, 2 N], 128 words for each 16 columns of 64 rows. Word 16 i + 4 j + q has at place p, bits
    4 p and up, the integer of row 16 q + 8 (p // 2 % 2) + i and column 2 j + 8 (p % 2) + p // 4. scales: fp32 or bf16
    [E, K / group, N], of each 64 rows that of row 8 a + i at 8 i + a. N is a multiple of 64, `group` of 16, K of it.
    All contiguous. Raises ValueError for any other.
    """

    values: Tensor
    scales: Tensor
    group: int

    def __post_init__(self) -> None:
        _, N, K = self.shape
        if self.values.dtype != torch.int32 or not (self.values.is_contiguous() and self.scales.is_contiguous()):
            raise ValueError("give contiguous values in int32, and contiguous scales")
        if N % 64 or self.group % 16 or K % self.group:
            raise ValueError(f"[{N}, {K}] in groups of {self.group}; give 64 rows at a time, columns in groups of 16")
        wanted = (len(self.values), K // self.group, N)
        if tuple(self.scales.shape) != wanted:
            raise ValueError(f"scales have shape {list(self.scales.shape)}; give {list(wanted)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, slices, words = self.values.shape
        return experts, words // 2, slices * 16

    def float(self) -> Tensor:
        """In fp32, [E, N, K]."""
        experts, N, K = self.shape
        places = torch.arange(0, 32, 4, dtype=torch.int32, device=self.values.device)
        words = self.values.view(experts, K // 16, N // 64, 8, 4, 4, 1)  # ..., i, j, q
        parts = ((words >> places) & 15) - INT4_ZERO
        parts = parts.unflatten(-1, (2, 2, 2))  # ..., p // 4, p // 2 % 2, p % 2
        rows = parts.permute(0, 2, 5, 7, 3, 1, 8, 4, 6)  # expert, 64 rows, q, p // 2 % 2, i, slice, p % 2, j, p // 4
        scales = self.scales.float().view(experts, K // self.group, N // 64, 8, 8).transpose(-1, -2)
        scales = scales.reshape(experts, K // self.group, N).transpose(1, 2).repeat_interleave(self.group, -1)
        return rows.reshape(experts, N, K) * scales

    def __getitem__(self, index: Tensor | slice) -> "Tiles":
        """Of experts."""
        return Tiles(self.values[index].contiguous(), self.scales[index].contiguous(), self.group)


Weight = Tensor | QuantizedWeight
