"""Do not apply adapters to tokens that ask for none, on a CPU."""

from typing import Any

import torch

from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def add_to_each_adapters_tokens(original: Function) -> Function:
    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y [T, N] += scale * B (A x) of each token's slot, slice after slice; slot -1 is the model's own."""
        from vllm_kimi_linear.cpu.products import linear

        if self.indices_len[0] is None:  # no step has been told whose tokens are whose: a layer is warmed up
            return
        slots = self.token_lora_indices
        for slot in slots.unique().tolist():
            if slot < 0:
                continue
            tokens = (slots == slot).nonzero().flatten()
            taken, first = x[tokens], 0
            for lora_a, lora_b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                part = y[:, first : first + width]
                part.index_add_(0, tokens, linear(linear(taken, lora_a[slot, 0]), lora_b[slot, 0]), alpha=scale)
                first += width

    return add_lora_linear


PATCH = Patch(
    symptom="With --enable-lora on a CPU, a request for the model itself is answered with the adapter in the last "
    "slot if a request in the same step uses an adapter. With the default --max-loras there is one slot, so it is "
    "that request's adapter.",
    cause="In the torch version of vLLM's LoRA products a token without an adapter has the slot -1, which as an "
    "index means the last one. It also copies an adapter's matrices once for each token.",
    upstream="vllm-project/vllm#48421, which is in 0.33.",
    remove_when="0.32 is no longer supported.",
    device="cpu",
    scope="process",
    versions=("0.32",),
    hooks=(
        Hook(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear",
            "self y x lora_a_stacked lora_b_stacked scale output_slices ...",
            add_to_each_adapters_tokens,
        ),
    ),
)
