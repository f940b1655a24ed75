"""What vLLM's second runner does for this model around each step, and leaves out of a step that only decodes.

vLLM prepares every step alike, in Python: metadata of each group of layers, and kernels that move states. Where a CUDA
graph replays a step of decodes, the graph reads its buffers and no metadata, and without drafts a state moves only into
a new block. With 20 groups of KDA layers that is a third of the work on the host, which one sequence waits for.
"""

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.mamba_utils import get_mamba_group_ids, get_mamba_groups

from vllm_kimi_linear import steady_steps
from vllm_kimi_linear.config.connectors import OFFLOADING
from vllm_kimi_linear.greedy_sampler import GreedySampler


class KimiLinearModelState(MambaHybridModelState):
    def __init__(self, vllm_config: Any, *args: Any) -> None:
        super().__init__(vllm_config, *args)
        self.drafts = vllm_config.num_speculative_tokens > 0
        transfer = vllm_config.kv_transfer_config
        self.replays_without_metadata = (
            self._align_mode
            and not self.drafts
            and (transfer is None or transfer.kv_connector == OFFLOADING)  # another may read the metadata
            and not vllm_config.additional_config.get("check_states")
        )
        self.steady_steps = steady_steps.takes(vllm_config)
        self.block_size = 0  # tokens of which a block holds a state, or that pass between two states
        self.kv_cache_group: int | None = None  # of MLA layers, where it is the only one
        self.prepared: steady_steps.Prepared | None = None  # of the last step
        self.last_step: steady_steps.SteadyStep | None = None  # from which the next can follow

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.prepared = self.last_step = self.kv_cache_group = None
        states = get_mamba_groups(kv_cache_config)
        self.block_size = next(iter(states)).block_size
        attention = sorted({*range(len(kv_cache_config.kv_cache_groups))} - {*get_mamba_group_ids(states)})
        if self.steady_steps and len(attention) == 1:
            [self.kv_cache_group] = attention
            steady_steps.warm_up(block_tables, self.kv_cache_group)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """The metadata of each layer; of KDA layers none where a captured graph replays decodes alone."""
        replayed = cudagraph_mode == CUDAGraphMode.FULL and not for_capture and not input_batch.has_prefill
        self.prepared = steady_steps.Prepared(input_batch, block_tables, slot_mappings) if replayed else None
        self.last_step = None  # whose buffers these are no more
        if replayed and self.replays_without_metadata:
            # What a graph reads of KDA layers is their state indices, in the buffer that this fills.
            self._mamba_ctx.compute_aligned_state_indices(input_batch.seq_lens, input_batch.num_reqs_after_padding)
            attn_groups = [
                [group for group in groups if not isinstance(group.kv_cache_spec, MambaSpec)] for groups in attn_groups
            ]
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture, **more
        )

    def preprocess_state(
        self,
        input_batch: Any,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Copy each state that the step takes into another block; without drafts the host knows when none does."""
        if self._align_mode and not self.drafts and not input_batch.has_prefill:
            before = input_batch.num_computed_tokens_np
            after = before + input_batch.num_scheduled_tokens
            if ((before - 1) // self.block_size == (after - 1) // self.block_size).all():
                return
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """Note how many drafts were accepted, and move states accordingly."""
        if self.drafts:
            super().postprocess_state(*args, **kwargs)

    def custom_sampler(self, sampler: Any) -> tuple[GreedySampler, None] | None:
        """vLLM's own with drafts and with watermarks, which are told to no other."""
        if self.drafts or getattr(self.vllm_config, "watermark_config", None) is not None:
            return None
        return GreedySampler.of(sampler), None
