"""Kimi Linear: decoder layer, model, and the class vLLM serves."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_kimi_linear import partial_sums, validation, weights
from vllm_kimi_linear.adapters.names import AdapterNames
from vllm_kimi_linear.cache import configured
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import GATE_UP
from vllm_kimi_linear.decode_products import linear, norm_linear
from vllm_kimi_linear.decode_step import DecodeStep, why_not
from vllm_kimi_linear.kda import KimiDeltaAttention, state_dtypes
from vllm_kimi_linear.mla import KimiLatentAttention
from vllm_kimi_linear.moe import GatedMlp, MixtureOfExperts
from vllm_kimi_linear.partial_sums import HiddenStates
from vllm_kimi_linear.quantized import quantization


class KimiDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the residual travels beside the hidden states."""

    def __init__(self, sizes: ModelSizes, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        index = int(prefix.rsplit(".", 1)[1])
        attention = KimiDeltaAttention if sizes.layer_types[index] == "kda" else KimiLatentAttention
        self.self_attn = attention(sizes, vllm_config, f"{prefix}.self_attn")
        if sizes.layer_moe[index]:
            self.block_sparse_moe = MixtureOfExperts(sizes, vllm_config.quant_config, f"{prefix}.block_sparse_moe")
        else:
            self.mlp = GatedMlp(sizes.hidden_size, sizes.intermediate_size, vllm_config.quant_config, f"{prefix}.mlp")
        self.is_moe = sizes.layer_moe[index]
        self.input_layernorm = RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        feed_forward = self.block_sparse_moe if self.is_moe else self.mlp
        return feed_forward(hidden_states), residual

    def decode(self, x: HiddenStates, residual: torch.Tensor | None) -> tuple[HiddenStates, torch.Tensor]:
        """`forward` of a step that `DecodeStep` takes."""
        mixer = self.self_attn
        projected, residual = norm_linear(x, residual, self.input_layernorm, mixer.in_proj)
        mixed = linear(mixer.decode(projected), mixer.o_proj)
        feed_forward = self.block_sparse_moe if self.is_moe else self.mlp
        return feed_forward.decode(partial_sums.all_reduce(mixed), residual, self.post_attention_layernorm)


class KimiLinearModel(nn.Module):
    """Embedding, the layers of this pipeline stage, final norm."""

    def __init__(self, sizes: ModelSizes, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        pipeline = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(sizes.vocab_size, sizes.hidden_size, prefix=f"{prefix}.embed_tokens")
            if pipeline.is_first_rank or (sizes.tied_embeddings and pipeline.is_last_rank)
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            sizes.num_layers,
            lambda prefix: KimiDecoderLayer(sizes, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        own = {index: self.layers[index] for index in range(self.start_layer, self.end_layer)}
        kda_layers = [layer.self_attn.prefix for index, layer in own.items() if sizes.layer_types[index] == "kda"]
        backends = {layer.block_sparse_moe.backend for layer in own.values() if layer.is_moe}
        self.decode_step = DecodeStep(next(iter(kda_layers), None), why_not(vllm_config, sizes, backends))
        partial_sums.prepare(vllm_config, sizes, self.decode_step)
        self.norm = RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps) if pipeline.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], sizes.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None = None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            hidden_states = self.embed_tokens(input_ids)
        decodes = self.decode_step.takes(len(hidden_states))
        for index in range(self.start_layer, self.end_layer):
            layer = self.layers[index].decode if decodes else self.layers[index]
            hidden_states, residual = layer(hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        x, residual, norm_weight = partial_sums.add_parts(hidden_states, residual, self.norm)
        return x if norm_weight is None else self.norm(x, residual)[0]


class KimiLinearForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsPP):
    """The model class vLLM builds for `"architectures": ["KimiLinearForCausalLM"]`."""

    packed_modules_mapping: ClassVar = {"gate_up_proj": list(GATE_UP)}  # for adapters; `AdaptedPart` for the others

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.sizes = configured.model_sizes(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.serving = False
        if vllm_config.lora_config is not None:
            self.hf_to_vllm_mapper = AdapterNames(self.sizes)
        vllm_config.quant_config = quantization(self.sizes, vllm_config.quant_config)
        self.model = KimiLinearModel(self.sizes, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            prefix, quant_config = maybe_prefix(prefix, "lm_head"), vllm_config.quant_config
            vocab, hidden = self.sizes.vocab_size, self.sizes.hidden_size
            self.lm_head = ParallelLMHead(vocab, hidden, quant_config=quant_config, prefix=prefix)
            if self.sizes.tied_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.sizes.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if current_platform.is_cpu():
            from vllm_kimi_linear.cpu.products import use_plain_products

            use_plain_products(self)
        _, state = state_dtypes(vllm_config.model_config, vllm_config.cache_config)
        validation.log_implementation(vllm_config, self.sizes, state)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Token ids [T] -> final hidden states [T, hidden_size]. Neither kind of attention uses positions."""
        return self.model(input_ids, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, checkpoint: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return weights.load(self, self.sizes, checkpoint, device=current_platform.device_type, whole=not self.serving)

    def process_weights_after_loading(self) -> None:
        """vLLM calls it once, after the first load; what is loaded later may come from a trainer, in pieces."""
        self.serving = True

    def get_model_state_cls(self) -> type:
        """What vLLM's second runner keeps a step; that of hybrid models takes none without a recurrent layer."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from vllm_kimi_linear.model_state import KimiLinearModelState

        return KimiLinearModelState if self.sizes.kda_layers else DefaultModelState

    # vLLM makes the blocks so large that each MLA layer's part holds a whole state of these; our layers say their own
    # (`kda.py`), and share a block among themselves (`cache/layout.py`).

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ()

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return ()

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        # Every token of a verified draft has a block with both states, so both are copied whole.
        return get_temporal_copy_spec, get_temporal_copy_spec
