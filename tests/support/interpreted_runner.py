"""vLLM's second runner without a GPU: its own code and kernels, Triton's interpreter, and a graph that only looks.

Import it in a process of its own where TRITON_INTERPRET is 1: it gives vLLM the Triton that it leaves out on a CPU.
"""

# ruff: noqa: E402  what imports Triton from vLLM comes behind

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
import vllm.triton_utils
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec, UniformTypeKVCacheSpecs

vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

# isort: split
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu import model_runner as module
from vllm.v1.worker.gpu.async_utils import StepTimingCollector
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_kimi_linear.model_state import KimiLinearModelState

buffer_utils.is_uva_available = lambda: False  # else it asks for pinned memory
MambaHybridModelState.initialize_kv_cache = lambda *args: None  # which looks for states that a model has

CPU = torch.device("cpu")
HIDDEN = 3
TILE = 16  # tokens; FLASH_ATTN_MLA's are multiples of it
GRAPHS = (1, 2, 4, 8)  # requests


class Graphs:
    """In a graph's place: what the graph would read, as it is when it is replayed."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: Any = None

    def take(self) -> Any:
        """The graph that was replayed last, and what it read; once."""
        seen, self.seen = self.seen, None
        return seen

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, num_active_loras: int, **_: Any
    ) -> BatchExecutionDescriptor:
        if uniform_token_count == 1:
            size = next(size for size in GRAPHS if size >= num_reqs)
            return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)

    def run_fullgraph(self, graph: BatchExecutionDescriptor) -> torch.Tensor:
        self.seen = graph, self.look()
        return torch.zeros(graph.num_tokens, HIDDEN)


class Latents:
    """In the place of the builder of FLASH_ATTN_MLA: the tiles of each sequence, in a buffer that stays."""

    supports_update_block_table = False

    def __init__(self, spec: Any, requests: int) -> None:
        self.kv_cache_spec, self.layer_names = spec, ["mla"]
        self.plan = torch.zeros(requests, dtype=torch.int32)

    def get_metadata_builder(self, ubatch: int = 0) -> "Latents":
        return self

    def build_metadata(self, common: Any, ubatch: int, **_: Any) -> Any:
        tiles = (common.seq_lens + TILE - 1) // TILE
        self.plan.zero_()
        self.plan[: len(tiles)] = tiles
        return SimpleNamespace(common=common)

    build_metadata_for_cudagraph_capture = build_metadata


class States:
    """In the place of the builder of one group of KDA layers."""

    supports_update_block_table = True
    mamba_aligned_state_indices: torch.Tensor | None = None

    def __init__(self, spec: Any, name: str) -> None:
        self.kv_cache_spec, self.layer_names = spec, [name]

    def get_metadata_builder(self, ubatch: int = 0) -> "States":
        return self

    def build_metadata(self, common: Any, ubatch: int, **_: Any) -> Any:
        return common

    build_metadata_for_cudagraph_capture = build_metadata

    def update_block_table(self, metadata: Any, block_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        return metadata


class StateIndices:
    """In the place of `MambaSpecDecodeGPUContext`, whose launches ask for a GPU; notes which states move."""

    def __init__(self, block_size: int, tables: list[torch.Tensor], requests: int) -> None:
        self.block_size, self.tables = block_size, tables
        self.aligned = torch.zeros(len(tables), requests, 1, dtype=torch.int32)
        self.moved: list[tuple[int, int, int]] = []

    def compute_aligned_state_indices(self, seq_lens: torch.Tensor, num_reqs: int) -> torch.Tensor:
        columns = ((seq_lens[:num_reqs] - 1) // self.block_size).clamp_min(0).long()[:, None]
        for group, table in enumerate(self.tables):
            self.aligned[group, :num_reqs] = table[:num_reqs].gather(1, columns)
        return self.aligned[:, :num_reqs]

    def run_fused_precopy(
        self, requests: int, state: torch.Tensor, source: torch.Tensor, offset: torch.Tensor, rows: torch.Tensor
    ) -> None:
        for row in rows.tolist():
            if 0 <= int(source[row]) != int(state[row]):
                self.moved.append((row, int(source[row]), int(state[row])))


def of_layers(cache: KVCacheConfig) -> KVCacheConfig:
    """As a worker has it, whose groups hold the specs of their layers one by one."""
    groups = []
    for group in cache.kv_cache_groups:
        specs = UniformTypeKVCacheSpecs.from_specs(dict.fromkeys(group.layer_names, group.kv_cache_spec))
        assert specs is not None
        groups.append(KVCacheGroupSpec(group.layer_names, specs))
    return replace(cache, kv_cache_groups=groups)


def runner(config: VllmConfig, cache: KVCacheConfig, requests: int, length: int) -> Any:
    """A runner that serves `cache`, with no model and no sampler: `sample` below stands for both."""

    class Runner(module.GPUModelRunner):
        """Counts the steps that vLLM prepares."""

        prepared = 0

        def prepare_inputs(self, *args: Any) -> Any:
            self.prepared += 1
            return super().prepare_inputs(*args)

    self: Any = object.__new__(Runner)
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    cache = of_layers(cache)
    tokens = config.scheduler_config.max_num_batched_tokens
    nothing = SimpleNamespace(
        add_request=lambda *_: None,
        remove_request=lambda *_: None,
        apply_staged_writes=lambda: None,
        zero_block_ids=lambda blocks: None,
        prepare_forward=lambda *_: None,
        no_forward=lambda step: SimpleNamespace(ec_connector_output=None),
        penalties_state=SimpleNamespace(output_bin_counts=None),
    )
    absent = (
        "lora_config pp_handler pooling_runner encoder_cache adaptive_verification aux_output_connector pcp_manager "
        "fast_prefill ubatch_runner speculator execute_model_state"
    )
    vars(self).update(
        dict.fromkeys(absent.split()),
        **dict.fromkeys(["sampler", "prompt_logprobs_worker", "eplb", "ec_connector", "kv_block_zeroer"], nothing),
        **dict.fromkeys(["use_pp", "is_encoder_decoder", "uses_inputs_embeds", "use_aux_hidden_state_outputs"], False),
        **dict.fromkeys(["is_first_pp_rank", "is_last_pp_rank"], True),
        **{name: getattr(config, name) for name in ("model_config", "parallel_config", "observability_config")},
        vllm_config=config,
        device=CPU,
        max_num_reqs=requests,
        max_num_tokens=tokens,
        max_model_len=length,
        decode_query_len=1,
        num_speculative_steps=0,
        dcp_size=1,
        kv_connector=NO_OP_KV_CONNECTOR,
        kv_cache_config=cache,
        kv_caches=[],
        lora_state=LoraState(requests),
        step_timing=StepTimingCollector(),
        model=lambda **inputs: torch.zeros(len(inputs["input_ids"]), HIDDEN),
    )
    self.input_buffers = InputBuffers(requests, tokens, CPU)
    self.req_states = RequestState(requests, length, tokens, 0, 1000, CPU)
    self.block_tables = BlockTables(
        [spec.block_size for spec in specs],
        requests,
        tokens,
        [length // spec.block_size + 2 for spec in specs],
        CPU,
        slot_mapping_enabled=[not isinstance(spec, MambaSpec) for spec in specs],
    )
    latents = Latents(specs[0], requests)
    states = [States(spec, f"kda.{group}") for group, spec in enumerate(specs[1:], 1)]
    self.attn_groups = [[latents], *([group] for group in states)]
    self.model_state = KimiLinearModelState(config, torch.nn.Module(), None, CPU)
    indices = StateIndices(specs[1].block_size, self.block_tables.input_block_tables[1:], requests)
    self.model_state.initialize_kv_cache(cache, self.block_tables)
    self.model_state._mamba_ctx = indices
    buffers = self.input_buffers

    def look() -> dict[str, torch.Tensor]:
        names = ("input_ids", "positions", "seq_lens", "query_start_loc", "is_padding")
        found = {name: getattr(buffers, name).clone() for name in names}
        found |= {f"table {g}": table.clone() for g, table in enumerate(self.block_tables.input_block_tables)}
        moved = torch.tensor(indices.moved)
        plan, slots = latents.plan.clone(), self.block_tables.slot_mappings.clone()
        return found | {"slots": slots, "states": indices.aligned.clone(), "moved": moved, "plan": plan}

    self.cudagraph_manager = Graphs(look)
    return self


def sample(self: Any) -> tuple[list[str], list[list[int]]]:
    """A token of each request that has read its prompt, made of its last; and the runner's own update of requests."""
    batch, self.execute_model_state = self.execute_model_state.input_batch, None
    last, at = batch.input_ids[batch.logits_indices].long(), batch.positions[batch.logits_indices]
    tokens = (last * 31 + at * 7 + 1) % 1000
    counts, rejected = get_num_sampled_and_rejected(
        batch.seq_lens.new_ones(batch.num_reqs),
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        self.req_states.prefill_len.gpu,
    )
    self.postprocess_sampled(batch.idx_mapping, tokens[:, None], counts, rejected, batch.query_start_loc)
    taken = [[token] * count for token, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    return batch.req_ids, taken
