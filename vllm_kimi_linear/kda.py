"""Kimi Delta Attention: projections -> convolution, gates, recurrence, gated norm (one kernel) -> output projection."""

from functools import cached_property

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CacheConfig, ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import divide, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from decode_kernels import interface as decode_interface
from kda_kernels import interface
from kda_kernels.constants import CHUNK_SIZE, SEGMENTED_TOKENS
from kda_kernels.interface import (
    DecodeArgs,
    KdaInputs,
    KdaParams,
    KdaState,
    PrefillArgs,
    PrefillCheckpoints,
    SpecDecodeArgs,
)
from vllm_kimi_linear.adapters.part import AdaptedPart, add_adapters
from vllm_kimi_linear.attention.kda_metadata import KdaMetadata
from vllm_kimi_linear.cache import configured
from vllm_kimi_linear.cache.layout import kda_state_shapes
from vllm_kimi_linear.cache.spec import KdaSpec
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import GATES_B
from vllm_kimi_linear.in_proj import InputProjection


def _load_heads(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
    """Load this rank's heads of a per-head vector stored flat or with axes of length one ([1, 1, H, 1])."""
    rank = get_tensor_model_parallel_rank()
    param.data.copy_(loaded_weight.reshape(-1).narrow(0, rank * param.numel(), param.numel()))


def _load_conv(param: nn.Parameter, loaded_weight: torch.Tensor, shard: int) -> None:
    """Load this rank's channels of q_, k_ or v_conv1d.weight [P, 1, W] into the packed [3P, W]."""
    rows = param.shape[0] // 3
    part = loaded_weight.squeeze(1).narrow(0, get_tensor_model_parallel_rank() * rows, rows)
    param.data.narrow(0, shard * rows, rows).copy_(part)


def _load_gate(param: nn.Parameter, loaded_weight: torch.Tensor, shard: int) -> None:
    """Load this rank's rows of f_b_proj or g_b_proj [P, D] into the packed [2, P, D]."""
    rows = param.shape[1]
    param.data[shard].copy_(loaded_weight.narrow(0, get_tensor_model_parallel_rank() * rows, rows))


def state_dtypes(model: ModelConfig, cache: CacheConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the convolution's state and of the recurrent one, which is fp32 unless --mamba-ssm-cache-dtype says bf16."""
    return model.dtype, torch.bfloat16 if cache.mamba_ssm_cache_dtype == "bfloat16" else torch.float32


class KimiDeltaAttention(nn.Module, MambaBase):
    """One KDA layer of one tensor-parallel rank (docs/kda.md sections 1 to 5).

    Its state lives in vLLM's paged cache, one block a sequence: the last W-1 projections
    [W-1, 3P] in the activation dtype, then the recurrent state [H, V, K] in fp32 or as asked.
    With drafted tokens it has one block more for each, of the same make.
    """

    def __init__(self, model_sizes: ModelSizes, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.model_sizes = model_sizes
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.prefix = prefix
        self.tp_size = get_tensor_model_parallel_world_size()
        quant_config = vllm_config.quant_config
        width, head_dim = model_sizes.kda_size, model_sizes.kda_head_dim
        self.width = divide(width, self.tp_size)
        heads = divide(model_sizes.kda_heads, self.tp_size)

        # q | k | v | beta | f_a | g_a, in the order of `parameters.KDA_IN_PROJ`; every rank needs f_a and g_a whole.
        self.in_proj = InputProjection(
            model_sizes.hidden_size,
            {
                "split": {"q_proj": width, "k_proj": width, "v_proj": width, "b_proj": model_sizes.kda_heads},
                "whole": {"f_a_proj": head_dim, "g_a_proj": head_dim},
            },
            quant_config,
            f"{prefix}.in_proj",
        )
        # f_b and g_b, one behind the other, so that one batched GEMM serves both.
        self.gates_b = nn.Parameter(torch.empty(2, self.width, head_dim), requires_grad=False)
        self.gates_b.weight_loader = _load_gate
        self.adapts = vllm_config.lora_config is not None
        if self.adapts:
            for gate in GATES_B:
                setattr(self, gate, AdaptedPart(head_dim, width, True, f"{prefix}.{gate}"))
        self.o_proj = RowParallelLinear(
            width, model_sizes.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.conv_weight = nn.Parameter(torch.empty(3 * self.width, model_sizes.conv_kernel_size), requires_grad=False)
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
        qkv, beta, low, *_ = projected.split([sum(widths[:3]), widths[3], sum(widths[4:6]), *widths[6:]], dim=-1)
        g, output_gate = self._gates(low)
        out = torch.empty_like(output_gate)
        torch.ops.vllm.kimi_delta_attention(qkv, g, beta, output_gate, out, self.prefix)
        return self.o_proj(out)[0]

    def decode(self, projected: torch.Tensor) -> torch.Tensor:
        """What `in_proj` gives for a step that `DecodeStep` takes -> the input of `o_proj`, [T, P]."""
        kernels = decode_interface.kernels(projected.device.type)
        metadata = get_forward_context().attn_metadata[self.prefix]
        return kernels.kda_decode(
            projected, self.gates_b, self.kernel_params, self.state, metadata.decode_state_indices[:, 0]
        )

    def _gates(self, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """low [T, 2D], f_a(x) | g_a(x) -> g and output_gate, [T, P] each."""
        if current_platform.is_cpu():
            from vllm_kimi_linear.cpu.products import linear

            g, output_gate = map(linear, low.chunk(2, dim=-1), self.gates_b)
        else:
            g, output_gate = torch.bmm(low.unflatten(1, (2, -1)).transpose(0, 1), self.gates_b.transpose(1, 2))
        if self.adapts:
            for gate, factor, part in zip((g, output_gate), low.chunk(2, dim=-1), GATES_B, strict=True):
                add_adapters(gate, factor.contiguous(), [getattr(self, part)])
        return g, output_gate

    def run(self, inputs: KdaInputs, out: torch.Tensor, metadata: KdaMetadata) -> None:
        """Run the kernels on the tokens of one step; `out` [T, P] is written, the state updated in place."""
        first, tokens = metadata.num_decode_tokens, metadata.num_tokens
        out[tokens:].zero_()  # tokens that pad a CUDA graph go on through the other layers
        if metadata.reordering is not None:
            inputs, mixed, out = inputs[metadata.reordering.tokens], out, torch.empty_like(out[:tokens])
        layer, spec, prefill = (self.kernel_params, self.state), metadata.spec_decode, metadata.prefill
        if spec is not None and first:
            table = (spec.cu_seqlens, metadata.decode_state_indices, spec.num_accepted_tokens)
            interface.spec_decode(SpecDecodeArgs(inputs[:first], *layer, *table, out[:first]))
        elif first:
            interface.decode(DecodeArgs(inputs[:first], *layer, metadata.decode_state_indices[:, 0], out[:first]))
        if prefill is not None:
            table = (prefill.cu_seqlens, metadata.prefill_state_indices, prefill.has_initial_state)
            ours = slice(first, tokens)
            interface.prefill(PrefillArgs(inputs[ours], *layer, *table, out[ours], metadata.prefill_checkpoints))
        if metadata.reordering is not None:
            mixed[metadata.reordering.tokens] = out

    def warm_up(self, inputs: KdaInputs, out: torch.Tensor) -> None:
        """Steps on the null state: of all tokens, for the memory of a real one; of a few, to compile what it calls.

        Prefill differs for sequences long enough to be split, and where states are kept at block boundaries; decode for
        one token and for many. Captured graphs of few tokens may hold the decode step's own kernels instead.
        """
        shapes = zip(self.get_state_shape(), self.get_state_dtype(), strict=True)
        state = KdaState(*(out.new_empty((1, *shape), dtype=dtype) for shape, dtype in shapes))
        layer = self.kernel_params, state
        null = torch.zeros(1, dtype=torch.int32, device=out.device)
        for most, keeps in ((len(out), False), (SEGMENTED_TOKENS, True), (CHUNK_SIZE, False), (CHUNK_SIZE, True)):
            tokens = slice(min(most, len(out)))
            cu_seqlens = torch.tensor([0, tokens.stop], dtype=torch.int32, device=out.device)
            checkpoints = PrefillCheckpoints(cu_seqlens[1:], null) if keeps else None
            interface.prefill(PrefillArgs(inputs[tokens], *layer, cu_seqlens, null, null > 0, out[tokens], checkpoints))
        for several in (1, len(out)):
            interface.decode(DecodeArgs(inputs[:several], *layer, null.repeat(several), out[:several]))

    @cached_property
    def kernel_params(self) -> KdaParams:
        return KdaParams(
            conv_weight=self.conv_weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.o_norm_weight,
            norm_eps=self.model_sizes.rms_norm_eps,
        )

    # What vLLM asks of a layer with a recurrent state.

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        layout = configured.cache_layout(vllm_config, 0, self.model_sizes)
        return spec and KdaSpec.of(spec, vllm_config.model_config.max_model_len, layout)

    @property
    def state(self) -> KdaState:
        """Made anew: vLLM binds a small cache first to measure graphs, and takes `kv_cache` away to free its memory."""
        return KdaState(*self.kv_cache)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return kda_state_shapes(self.model_sizes, self.tp_size)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.model_config, self.cache_config)


@eager_break_during_capture
def _kimi_delta_attention(
    qkv: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    output_gate: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The KDA core as one opaque operation, so that compilation and graph capture see no data-dependent code."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    inputs = KdaInputs(qkv=qkv, g=g, beta=beta, output_gate=output_gate)
    metadata = context.attn_metadata or {}
    if layer_name in metadata:
        layer.run(inputs, out, metadata[layer_name])
    elif any(isinstance(found, KdaMetadata) for found in metadata.values()):
        raise KeyError(f"{layer_name} is missing from this step's metadata, which other KDA layers have")
    else:  # vLLM measures the memory that a step takes, or warms up other layers
        layer.warm_up(inputs, out)


direct_register_custom_op(
    op_name="kimi_delta_attention",
    op_func=_kimi_delta_attention,
    mutates_args=["out"],
    fake_impl=lambda *_, **__: None,
)
