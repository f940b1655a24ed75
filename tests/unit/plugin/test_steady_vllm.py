"""What steps that go on count on in vLLM, read from its sources: another vLLM has to be read again."""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu import sample
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import ExecuteModelState, GPUModelRunner
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_kimi_linear.steady_steps import SteadyStep

# What `execute_model` takes of a runner: of all this a step that goes on leaves out only what does nothing there.
TAKEN = (
    "_merge_ec_connector_no_forward _set_active_loras add_requests attn_groups aux_output_connector block_tables "
    "cp_interleave cudagraph_manager decode_query_len dcp_rank dcp_size dp_rank dp_size ec_connector encoder_cache "
    "eplb execute_model_state finish_requests free_states gather_batch_req_state input_buffers intermediate_tensors "
    "is_encoder_decoder is_first_pp_rank is_last_pp_rank kv_cache_config kv_connector lora_config lora_manager "
    "lora_state max_model_len model model_config model_state observability_config parallel_config pcp_manager "
    "pp_handler prepare_attn prepare_dummy_attn prepare_inputs req_states step_timing supports_mm_inputs ubatch_runner "
    "update_pp_decode_requests update_requests use_aux_hidden_state_outputs uses_inputs_embeds vllm_config vocab_size"
)
# What a scheduler sends beside what `goes_on` looks at: nothing of it concerns a step of this model without drafts.
SENT = (
    "aux_output_connector_metadata ec_connector_metadata ec_manager_metadata encoder_input_updates "
    "free_encoder_mm_hashes has_sync_kv_loads kv_connector_block_state kv_connector_metadata num_common_prefix_blocks "
    "num_invalid_spec_tokens num_spec_tokens_to_schedule pending_structured_output_tokens "
    "scheduled_encoder_input_stats scheduled_encoder_inputs skip_drafts"
)


def test_vllm_does_nothing_else_in_a_step() -> None:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(GPUModelRunner.execute_model)))
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    taken = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    assert taken <= {*TAKEN.split()}
    asked = set(inspect.unwrap(SteadyStep.goes_on).__code__.co_names)
    assert {field.name for field in dataclasses.fields(SchedulerOutput)} <= {*SENT.split(), *asked}


def test_vllm_stages_sampling_parameters_for_requests_that_are_added_alone() -> None:
    """So there are none in a step that goes on, which leaves their copies to the device out."""
    stagers = set()
    for path in Path(str(sample.__path__[0])).glob("*.py"):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr
                targets = node.targets if isinstance(node, ast.Assign) else []
                written = [ast.unparse(target) for target in targets if ".np[" in ast.unparse(target)]
                if written or str(called).startswith("stage_write"):
                    stagers.add(function.name)
    assert stagers == {"add_request"}


def test_vllm_indexes_with_the_rows_of_logits_and_does_nothing_else_with_them() -> None:
    """Where no drafts are, nor shards of a batch: a slice in their place gives the same rows."""
    for function in (GPUModelRunner.sample, GPUModelRunner.sample_tokens, Sampler.__call__):
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "logits_indices"]
        indexed = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
        assert all(node in indexed for node in named)


def test_vllm_has_what_this_takes() -> None:
    assert {"input_batch", "attn_metadata", "hidden_states", "finished_req_ids"} < set(ExecuteModelState._fields)
    dispatched = list(inspect.signature(CudaGraphManager.dispatch).parameters)
    assert dispatched[:6] == [
        "self",
        "num_reqs",
        "num_tokens",
        "uniform_token_count",
        "num_active_loras",
        "max_query_len",
    ]
