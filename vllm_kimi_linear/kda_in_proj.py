"""The input projection of a KDA layer: all that is multiplied with the layer's input, in one product."""

import torch
from torch import nn
from vllm.distributed import divide, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_kimi_linear.config.model import ModelSizes


class KdaInputProjection(MergedColumnParallelLinear):
    """x -> q | k | v | beta | f_a | g_a in one GEMM.

    q, k, v and beta are split over the tensor-parallel ranks by heads; the two low-rank inputs f_a and g_a
    are needed whole by every rank, so their weights are repeated once a rank before they are split.
    The parts stand in the order of `weights.IN_PROJ`. Where they leave a row that does not end on 16 bytes (4
    heads), zeros are appended: GEMMs and kernels then read whole vectors.
    """

    REPLICATED = (4, 5)  # f_a and g_a
    ROW_MULTIPLE = 8  # elements

    def __init__(self, model_sizes: ModelSizes, quant_config: QuantizationConfig | None, prefix: str) -> None:
        ranks = get_tensor_model_parallel_world_size()
        width, rank = model_sizes.kda_size, model_sizes.kda_head_dim
        sizes = [width, width, width, model_sizes.kda_heads, rank * ranks, rank * ranks]
        padding = -sum(sizes) // ranks % self.ROW_MULTIPLE
        if padding:
            sizes.append(padding * ranks)
        super().__init__(model_sizes.hidden_size, sizes, bias=False, quant_config=quant_config, prefix=prefix)
        self.local_sizes = [divide(size, ranks) for size in sizes]
        if padding and quant_config is None:
            self.weight.data[-padding:].zero_()

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None
    ) -> None:
        super().weight_loader(param, self._whole(loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None
    ) -> None:
        super().weight_loader_v2(param, self._whole(loaded_weight, loaded_shard_id), loaded_shard_id)

    def _whole(self, weight: torch.Tensor, shard: int | None) -> torch.Tensor:
        if shard in self.REPLICATED and weight.dim() > 0:
            return weight.repeat(self.tp_size, *[1] * (weight.dim() - 1))
        return weight
