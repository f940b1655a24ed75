"""Let a step that goes on as the one before begin with one launch.

Such a step decodes one token more of each sequence of the step before, inside their blocks, and the same graph replays
it. Of what the graph reads only each sequence's token, position, length and slot are others, and the plan of vLLM's
attention where a sequence enters a tile of keys. `next_inputs.py` writes the former, vLLM the latter; all else stays.

Whether a step is such a one is told by what the scheduler sends, which all ranks have alike. Every other step is
vLLM's own, and so is what follows the graph: logits, sampling, the update of the requests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig

from vllm_kimi_linear.patches.patch import Function, Hook, Patch

# Tokens. FLASH_ATTN_MLA plans a step by the number of tiles of keys of each sequence; a tile is a multiple of this.
TILE = 16


def takes(vllm_config: VllmConfig) -> bool:
    """Whether steps of this configuration do nothing but what a `SteadyStep` knows of."""
    extra, parallel = vllm_config.additional_config, vllm_config.parallel_config
    return bool(
        extra.get("steady_steps", True)
        and not extra.get("check_states")  # looks at every step
        and not vllm_config.num_speculative_tokens
        and vllm_config.kv_transfer_config is None
        and vllm_config.lora_config is None
        and getattr(vllm_config, "watermark_config", None) is None
        and not vllm_config.model_config.enable_prompt_embeds
        and parallel.pipeline_parallel_size == parallel.data_parallel_size == 1
        and parallel.decode_context_parallel_size == 1
    )


def warm_up(block_tables: Any, kv_cache_group: int) -> None:
    """Compile the one launch, so that no request waits for it. block_tables: vLLM's `BlockTables`."""
    table = block_tables.block_tables[kv_cache_group].gpu
    if table.is_cuda:
        from vllm_kimi_linear import next_inputs

        next_inputs.warm_up(table, block_tables.block_sizes[kv_cache_group])


@dataclass(frozen=True)
class Prepared:
    """What vLLM has prepared for a step of decodes that a graph replays."""

    batch: Any  # vLLM's InputBatch
    block_tables: tuple[torch.Tensor, ...]  # of each group of layers
    slot_mappings: torch.Tensor  # [groups, tokens]


@dataclass(frozen=True)
class SteadyStep:
    """A step of one token of each sequence that a graph replayed, as what the next follows from if it goes on."""

    prepared: Prepared  # by vLLM, for this step or one before
    state: Any  # vLLM's ExecuteModelState
    graph: Any  # vLLM's BatchExecutionDescriptor
    write_inputs: Callable[[], None]
    token: np.ndarray  # [requests of the graph]: 1, and 0 of those that pad it
    computed: list[int]  # tokens of each sequence before the next step

    @classmethod
    def of(cls, runner: Any) -> "SteadyStep | None":
        """The step that the runner has just run; None if it is no such step."""
        state, ours = runner.execute_model_state, runner.model_state
        prepared, group = ours.prepared, ours.kv_cache_group
        if state is None or prepared is None or prepared.batch is not state.input_batch or group is None:
            return None
        batch, requests = prepared.batch, prepared.batch.num_reqs
        graph = runner.cudagraph_manager.dispatch(requests, requests, 1, 0, max_query_len=1)
        if batch.num_tokens != requests or graph.cg_mode != CUDAGraphMode.FULL:
            return None
        from vllm_kimi_linear import next_inputs

        write_inputs = partial(
            next_inputs.write,
            batch.idx_mapping,
            runner.req_states.num_computed_tokens.gpu,
            runner.req_states.last_sampled_tokens,
            runner.input_buffers.input_ids,
            runner.input_buffers.positions,
            runner.input_buffers.seq_lens,
            runner.block_tables.block_tables[group].gpu,
            runner.block_tables.slot_mappings[group],
            runner.block_tables.block_sizes[group],
        )
        token = (np.arange(len(batch.seq_lens_cpu_upper_bound)) < requests).astype(np.int32)
        return cls(prepared, state, graph, write_inputs, token, (batch.num_computed_tokens_np + 1).tolist())

    def goes_on(self, output: Any, block_size: int) -> bool:
        """Whether the step that the scheduler sends does nothing but go on. block_size: tokens that a state covers."""
        cached, names = output.scheduled_cached_reqs, self.prepared.batch.req_ids
        return (
            cached.req_ids == names
            and cached.num_computed_tokens == self.computed
            and output.total_num_scheduled_tokens == len(names)
            and list(output.num_scheduled_tokens) == names
            and not any(cached.new_block_ids)
            and not any(tokens % block_size == 0 for tokens in self.computed)
            and not (output.scheduled_new_reqs or output.finished_req_ids or output.preempted_req_ids)
            and not (output.scheduled_spec_decode_tokens or output.has_structured_output_requests)
            and not (output.new_block_ids_to_zero or output.kv_cache_block_copies)
        )

    def next(self, runner: Any, output: Any) -> "SteadyStep":
        """Run the step that goes on; what vLLM samples from is in its place afterwards."""
        last, metadata = self.state.input_batch, self.state.attn_metadata
        batch = object.__new__(type(last))
        vars(batch).update(
            vars(last),
            num_computed_tokens_np=last.num_computed_tokens_np + 1,
            seq_lens_cpu_upper_bound=torch.from_numpy(last.seq_lens_cpu_upper_bound.numpy() + self.token),
            logits_indices=slice(last.num_reqs),  # vLLM indexes with these: so it takes a view in place of a copy
        )
        runner.req_states.num_computed_tokens_np[batch.idx_mapping_np] = batch.num_computed_tokens_np
        self.write_inputs()
        if any(tokens % TILE == 0 for tokens in self.computed):
            metadata = runner.model_state.prepare_attn(
                batch,
                self.graph.cg_mode,
                self.prepared.block_tables,
                self.prepared.slot_mappings,
                runner.attn_groups,
                runner.kv_cache_config,
            )
        hidden_states = runner.cudagraph_manager.run_fullgraph(self.graph)
        runner.execute_model_state = state = self.state._replace(
            input_batch=batch,
            attn_metadata=metadata,
            hidden_states=hidden_states,
            finished_req_ids=output.finished_req_ids,
        )
        return replace(self, state=state, computed=[tokens + 1 for tokens in self.computed])


def go_on(original: Function) -> Function:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        state = self.model_state
        if not getattr(state, "steady_steps", False):
            return original(self, scheduler_output, *args, **options)
        last, state.last_step = state.last_step, None  # nothing follows from a step that fails
        dummy_run = options or len(args) > 1
        if last is not None and not dummy_run and last.goes_on(scheduler_output, state.block_size):
            state.last_step = last.next(self, scheduler_output)
            return None
        result = original(self, scheduler_output, *args, **options)
        if not dummy_run:
            state.last_step = SteadyStep.of(self)
        return result

    return execute_model


PATCH = Patch(
    symptom="One sequence of the 48B in FP8 decodes at 2.8 ms a token; with this it is 1.7.",
    cause="`GPUModelRunner.execute_model` takes no notice of the step before: requests, batch, block tables, slots, "
    "metadata and sampling parameters are prepared anew in some fifty operations of 20 to 50 us.",
    remove_when="vLLM prepares a step that goes on as the one before in a few launches.",
    device="cuda",
    speed=True,
    hooks=(Hook("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", "self scheduler_output ...", go_on),),
)
