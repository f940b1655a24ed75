"""What adapters add to one part of a product that runs fused, where vLLM would know one layer for all parts."""

from collections.abc import Collection

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import divide
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase


class AdaptedPart(LinearBase, BaseLayerWithLoRA):
    """The matrices A [r, K] and B [N, r] of every adapter in use, for one part; the weight [N, K] is the fused layer's.

    vLLM finds it by its name, hands it each adapter's matrices, and tells it which tokens are whose.
    """

    def __init__(self, columns: int, rows: int, split: bool, prefix: str) -> None:
        """rows: of all ranks, which share them if `split`, else each needs them whole."""
        super().__init__(columns, rows, prefix=prefix)
        self.quant_method = None  # there is nothing to multiply by but the adapters
        self.split, own = split, divide(rows, self.tp_size) if split else rows
        config = get_current_vllm_config().lora_config
        slots, rank, dtype = config.max_loras, config.max_lora_rank, config.lora_dtype
        self.lora_a_stacked = (torch.zeros(slots, 1, rank, columns, dtype=dtype),)
        self.lora_b_stacked = (torch.zeros(slots, 1, own, rank, dtype=dtype),)

    def reset_lora(self, index: int) -> None:
        for stacked in (*self.lora_a_stacked, *self.lora_b_stacked):
            stacked[index].zero_()

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """lora_a [r, K], lora_b [N, r] whole, with the adapter's scale in it."""
        self.reset_lora(index)
        [stacked_a], [stacked_b] = self.lora_a_stacked, self.lora_b_stacked
        own = stacked_b.shape[2]
        if self.split:
            lora_b = lora_b[self.tp_rank * own : (self.tp_rank + 1) * own]
        stacked_a[index, 0, : len(lora_a)].copy_(lora_a, non_blocking=True)
        stacked_b[index, 0, : len(lora_b), : lora_b.shape[1]].copy_(lora_b, non_blocking=True)


def add_adapters(out: torch.Tensor, x: torch.Tensor, parts: Collection[AdaptedPart]) -> None:
    """out [T, N, or more] += what each token's adapter makes of x [T, K], the parts side by side from the first on."""
    first = next(iter(parts))
    stacked_a, stacked_b = ([getattr(part, name)[0] for part in parts] for name in ("lora_a_stacked", "lora_b_stacked"))
    widths = tuple(b.shape[2] for b in stacked_b)
    first.punica_wrapper.add_lora_linear(out, x, tuple(stacked_a), tuple(stacked_b), 1.0, widths)
