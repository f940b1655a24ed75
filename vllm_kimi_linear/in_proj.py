"""The input projection of a mixer: all that is multiplied with the layer's input, in one product."""

from typing import TypedDict

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import divide, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_kimi_linear.adapters.part import AdaptedPart, add_adapters

ROW_MULTIPLE = 16  # elements: 32 bytes, and what fp8 products ask for


class Parts(TypedDict):
    """Output sizes by name: first of parts whose heads the ranks share, then of those that each needs whole."""

    split: dict[str, int]
    whole: dict[str, int]


class InputProjection(MergedColumnParallelLinear):
    """x -> its parts, side by side, in one GEMM.

    The weights of what each rank needs whole are repeated once a rank before they are split. Where the parts leave a
    row that is no multiple of 16 elements (4 heads), zeros are appended: GEMMs and kernels then read whole vectors.
    """

    def __init__(self, hidden_size: int, parts: Parts, quant_config: QuantizationConfig | None, prefix: str) -> None:
        ranks = get_tensor_model_parallel_world_size()
        sizes = [*parts["split"].values(), *(size * ranks for size in parts["whole"].values())]
        self.whole = range(len(parts["split"]), len(sizes))
        self.padding = -sum(sizes) // ranks % ROW_MULTIPLE
        if self.padding:
            sizes.append(self.padding * ranks)
        super().__init__(hidden_size, sizes, bias=False, quant_config=quant_config, prefix=prefix)
        self.local_sizes = [divide(size, ranks) for size in sizes]
        self.adapted: list[AdaptedPart] = []
        if get_current_vllm_config().lora_config is not None:
            for name, size in (parts["split"] | parts["whole"]).items():
                part = AdaptedPart(hidden_size, size, name in parts["split"], f"{prefix}.{name}")
                setattr(self, name, part)
                self.adapted.append(part)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter | None]:
        out, bias = super().forward(x)
        if self.adapted:
            add_adapters(out, x, self.adapted)
        return out, bias

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None
    ) -> None:
        self._pad(param)
        super().weight_loader(param, self._for_ranks(loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None
    ) -> None:
        self._pad(param)
        super().weight_loader_v2(param, self._for_ranks(loaded_weight, loaded_shard_id), loaded_shard_id)

    def _pad(self, param: nn.Parameter) -> None:
        """Done as parts are loaded: what is quantised online has no memory before."""
        if self.padding and param.shape[:1] == (sum(self.local_sizes),):
            param.data[-self.padding :].zero_()

    def _for_ranks(self, weight: torch.Tensor, shard: int | None) -> torch.Tensor:
        if shard in self.whole and weight.dim() > 0:
            return weight.repeat(self.tp_size, *[1] * (weight.dim() - 1))
        return weight
