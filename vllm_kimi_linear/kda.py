"""The KDA mixer: projections -> convolution, gates, recurrence, gated norm (one kernel) -> output projection."""

from functools import cached_property

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import divide, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from kda_kernels import ops
from kda_kernels.types import KdaInputs, KdaParams, KdaState
from vllm_kimi_linear import memory
from vllm_kimi_linear.config import Geometry
from vllm_kimi_linear.metadata import KdaMetadata


class KdaInputProjection(MergedColumnParallelLinear):
    """x -> q | k | v | beta | f_a | g_a in one GEMM.

    q, k, v and beta are split over the tensor-parallel ranks by heads; the two low-rank inputs f_a and g_a
    are needed whole by every rank, so their weights are repeated once a rank before they are split.
    The parts stand in the order of `weights.IN_PROJ`.
    """

    REPLICATED = (4, 5)  # f_a and g_a

    def __init__(self, geometry: Geometry, quant_config: QuantizationConfig | None, prefix: str) -> None:
        ranks = get_tensor_model_parallel_world_size()
        width, rank = geometry.kda_size, geometry.kda_head_dim
        sizes = [width, width, width, geometry.kda_heads, rank * ranks, rank * ranks]
        super().__init__(
            geometry.hidden_size, sizes, bias=False, quant_config=quant_config, prefix=prefix
        )
        self.local_sizes = [divide(size, ranks) for size in sizes]

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        super().weight_loader(param, self._whole(loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None):
        super().weight_loader_v2(param, self._whole(loaded_weight, loaded_shard_id), loaded_shard_id)

    def _whole(self, weight: torch.Tensor, shard: int | None) -> torch.Tensor:
        if shard in self.REPLICATED and weight.dim() > 0:
            return weight.repeat(self.tp_size, *[1] * (weight.dim() - 1))
        return weight


def _load_heads(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
    """Load this rank's heads of a per-head vector stored flat or with axes of length one ([1, 1, H, 1])."""
    rank = get_tensor_model_parallel_rank()
    param.data.copy_(loaded_weight.reshape(-1).narrow(0, rank * param.numel(), param.numel()))


def _load_conv(param: nn.Parameter, loaded_weight: torch.Tensor, shard: int) -> None:
    """Load this rank's channels of q_, k_ or v_conv1d.weight [P, 1, taps] into the packed [3P, taps]."""
    rows = param.shape[0] // 3
    part = loaded_weight.squeeze(1).narrow(0, get_tensor_model_parallel_rank() * rows, rows)
    param.data.narrow(0, shard * rows, rows).copy_(part)


class KimiDeltaAttention(nn.Module, MambaBase):
    """One KDA layer of one tensor-parallel rank (docs/kda.md sections 1 to 5).

    Its state lives in vLLM's paged cache, one block a sequence: the last taps-1 projections
    [taps-1, 3P] in the activation dtype, then the recurrent state [H, V, K] in fp32.
    """

    def __init__(
        self,
        geometry: Geometry,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.prefix = prefix
        self.tp_size = get_tensor_model_parallel_world_size()
        quant_config = vllm_config.quant_config
        width, head_dim = geometry.kda_size, geometry.kda_head_dim
        self.width = divide(width, self.tp_size)
        heads = divide(geometry.kda_heads, self.tp_size)

        self.in_proj = KdaInputProjection(geometry, quant_config, f"{prefix}.in_proj")
        self.f_b_proj = ColumnParallelLinear(
            head_dim, width, bias=False, quant_config=quant_config, prefix=f"{prefix}.f_b_proj"
        )
        self.g_b_proj = ColumnParallelLinear(
            head_dim, width, bias=False, quant_config=quant_config, prefix=f"{prefix}.g_b_proj"
        )
        self.o_proj = RowParallelLinear(
            width, geometry.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.conv_weight = nn.Parameter(
            torch.empty(3 * self.width, geometry.conv_taps), requires_grad=False
        )
        self.conv_weight.weight_loader = _load_conv
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32), requires_grad=False)
        self.A_log.weight_loader = _load_heads
        self.dt_bias = nn.Parameter(torch.empty(self.width, dtype=torch.float32), requires_grad=False)
        self.dt_bias.weight_loader = _load_heads
        self.o_norm_weight = nn.Parameter(torch.empty(head_dim), requires_grad=False)

        compilation_config = get_current_vllm_config().compilation_config
        if prefix in compilation_config.static_forward_context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        compilation_config.static_forward_context[prefix] = self
        self.kv_cache = (torch.tensor([]), torch.tensor([]))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, hidden_size] after the input norm -> [T, hidden_size]."""
        projected, _ = self.in_proj(hidden_states)
        widths = self.in_proj.local_sizes
        qkv, beta, forget_low, gate_low = projected.split(
            [sum(widths[:3]), widths[3], widths[4], widths[5]], dim=-1
        )
        forget, _ = self.f_b_proj(forget_low)
        gate, _ = self.g_b_proj(gate_low)
        out = torch.empty_like(gate)
        torch.ops.vllm.kimi_delta_attention(qkv, forget, beta, gate, out, self.prefix)
        return self.o_proj(out)[0]

    def mix(self, inputs: KdaInputs, out: torch.Tensor, metadata: KdaMetadata) -> None:
        """Run the kernels on the rows of one step; `out` [T, P] is written, the state updated in place."""
        params, state = self.kernel_params, self.state
        decodes, tokens = metadata.num_decodes, metadata.num_tokens
        if decodes:
            ops.decode(_rows(inputs, 0, decodes), params, state, metadata.decode_slots, out[:decodes])
        if metadata.num_prefills:
            ops.prefill(
                _rows(inputs, decodes, tokens),
                params,
                state,
                metadata.prefill_cu_seqlens,
                metadata.prefill_slots,
                metadata.prefill_resume,
                out[decodes:tokens],
            )

    @cached_property
    def kernel_params(self) -> KdaParams:
        return KdaParams(
            conv_weight=self.conv_weight,
            a_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.o_norm_weight,
            norm_eps=self.geometry.rms_norm_eps,
        )

    # What vLLM asks of a layer with a recurrent state.

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.state = KdaState(*self.kv_cache)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return memory.kda_state_shapes(self.geometry)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (self.model_config.dtype, torch.float32)


def _rows(inputs: KdaInputs, first: int, last: int) -> KdaInputs:
    rows = slice(first, last)
    return KdaInputs(inputs.qkv[rows], inputs.forget[rows], inputs.beta[rows], inputs.gate[rows])


def _kimi_delta_attention(
    qkv: torch.Tensor,
    forget: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The KDA core as one opaque operation, so that compilation and graph capture see no data-dependent code."""
    context = get_forward_context()
    if context.attn_metadata is None:
        out.zero_()  # vLLM's profiling run: memory is measured, there is no cache yet
        return
    layer = context.no_compile_layers[layer_name]
    metadata = context.attn_metadata[layer_name]
    layer.mix(KdaInputs(qkv=qkv, forget=forget, beta=beta, gate=gate), out, metadata)


def _kimi_delta_attention_fake(
    qkv: torch.Tensor,
    forget: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    return


direct_register_custom_op(
    op_name="kimi_delta_attention",
    op_func=_kimi_delta_attention,
    mutates_args=["out"],
    fake_impl=_kimi_delta_attention_fake,
)
