"""Which steps go on as the one before, and what they leave behind.

That what a graph reads is what vLLM would have written: `tests/e2e/plugin/test_steady_runner.py`.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from vllm_kimi_linear import steady_steps
from vllm_kimi_linear.steady_steps import Prepared, SteadyStep

BLOCK = 64
NAMES = ["a", "b"]


def output(computed: list[int], names: list[str] = NAMES, **more: Any) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs = CachedRequestData.make_empty()
    step.scheduled_cached_reqs.req_ids = list(names)
    step.scheduled_cached_reqs.num_computed_tokens = list(computed)
    step.scheduled_cached_reqs.new_block_ids = [None] * len(names)
    step.num_scheduled_tokens = dict.fromkeys(names, 1)
    step.total_num_scheduled_tokens = len(names)
    for name, value in more.items():
        setattr(step, name, value)
    return step


class Batch:
    """Of vLLM's `InputBatch` what is taken."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def batch(computed: list[int], padded: int = 2, **more: Any) -> Any:
    bound = torch.tensor([*(tokens + 1 for tokens in computed), *[0] * (padded - len(computed))], dtype=torch.int32)
    fields = {
        "req_ids": NAMES[: len(computed)],
        "num_reqs": len(computed),
        "num_tokens": len(computed),
        "idx_mapping_np": np.arange(len(computed)),
        "num_computed_tokens_np": np.array(computed, np.int32),
        "seq_lens_cpu_upper_bound": bound,
    }
    return Batch(**fields | more)


class State(NamedTuple):
    input_batch: Any
    attn_metadata: Any
    hidden_states: Any
    finished_req_ids: set[str]


def step(computed: list[int]) -> SteadyStep:
    """The step after which the sequences have so many tokens."""
    prepared = Prepared(batch([tokens - 1 for tokens in computed]), (), torch.zeros(1))
    state = State(prepared.batch, "metadata", "hidden states", {"c"})
    graph, token = SimpleNamespace(cg_mode=CUDAGraphMode.FULL), np.ones(len(computed), np.int32)
    return SteadyStep(prepared, state, graph, lambda: None, token, list(computed))


def test_a_step_goes_on() -> None:
    assert step([5, 70]).goes_on(output([5, 70]), BLOCK)


@pytest.mark.parametrize(
    "more",
    [
        {"scheduled_new_reqs": [object()]},
        {"finished_req_ids": {"c"}},
        {"preempted_req_ids": {"c"}},
        {"scheduled_spec_decode_tokens": {"a": [1]}},
        {"has_structured_output_requests": True},
        {"new_block_ids_to_zero": [3]},
        {"kv_cache_block_copies": [object()]},
        {"total_num_scheduled_tokens": 3},
        {"num_scheduled_tokens": {"b": 1, "a": 1}},  # in another order
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_step_that_does_anything_else_does_not(more: dict[str, Any]) -> None:
    assert not step([5, 70]).goes_on(output([5, 70], **more), BLOCK)


def test_nor_does_one_of_others_or_of_other_tokens() -> None:
    assert not step([5, 70]).goes_on(output([5, 70, 9], [*NAMES, "c"]), BLOCK)
    assert not step([5, 70]).goes_on(output([5], ["a"]), BLOCK)
    assert not step([5, 70]).goes_on(output([5, 70], ["a", "c"]), BLOCK)
    assert not step([5, 70]).goes_on(output([5, 69]), BLOCK)  # tokens were taken back
    mixed = output([5, 70])
    mixed.scheduled_cached_reqs.req_ids = ["b", "a"]
    assert not step([5, 70]).goes_on(mixed, BLOCK)


def test_nor_into_a_block() -> None:
    assert not step([5, 128]).goes_on(output([5, 128]), BLOCK)
    grown = output([5, 70])
    grown.scheduled_cached_reqs.new_block_ids = [None, ([], [7])]
    assert not step([5, 70]).goes_on(grown, BLOCK)


class Runner:
    """Its steps say what they did."""

    def __init__(self, **state: Any) -> None:
        values = {
            "steady_steps": True,
            "last_step": None,
            "prepared": None,
            "kv_cache_group": 0,
            "block_size": BLOCK,
        }
        self.did: list[Any] = []
        self.model_state = SimpleNamespace(**values | state, prepare_attn=self.prepare_attn)
        self.kv_cache_config = self.attn_groups = None
        self.execute_model_state: Any = None
        self.req_states = SimpleNamespace(num_computed_tokens_np=np.zeros(2, np.int32))
        self.cudagraph_manager = SimpleNamespace(run_fullgraph=self.replay)

    def replay(self, graph: Any) -> str:
        self.did.append("replay")
        return "hidden"

    def prepare_attn(self, *args: Any) -> str:
        self.did.append("plan")
        return "plan"

    def vllms(self, scheduler_output: Any, *args: Any, **options: Any) -> str:
        self.did.append("vLLM's")
        if scheduler_output is None:
            raise RuntimeError("out of memory")
        return "vLLM's"

    def execute_model(self, *args: Any, **options: Any) -> Any:
        return steady_steps.go_on(Runner.vllms)(self, *args, **options)


def test_what_goes_on_replays_the_graph_and_leaves_what_vllm_samples_from() -> None:
    runner = Runner(last_step=step([5, 70]))
    assert runner.execute_model(output([5, 70]), None) is None
    assert runner.did == ["replay"]
    state = runner.execute_model_state
    assert state.input_batch.num_computed_tokens_np.tolist() == [5, 70]
    assert state.input_batch.seq_lens_cpu_upper_bound.tolist() == [6, 71]
    hidden_states = torch.zeros(4, 3)  # two rows pad the graph
    sampled_from = hidden_states[state.input_batch.logits_indices]
    assert sampled_from.shape == (2, 3) and sampled_from.data_ptr() == hidden_states.data_ptr()
    assert runner.req_states.num_computed_tokens_np.tolist() == [5, 70]
    assert (state.hidden_states, state.attn_metadata, state.finished_req_ids) == ("hidden", "metadata", set())
    assert runner.execute_model(output([6, 71])) is None
    assert state.input_batch.num_computed_tokens_np.tolist() == [5, 70]  # what a step was given stays
    assert runner.execute_model_state.input_batch.num_computed_tokens_np.tolist() == [6, 71]
    assert runner.did == ["replay", "replay"]


def test_attention_plans_anew_in_another_tile() -> None:
    runner = Runner(last_step=step([5, 79]))
    for tokens in (79, 80, 81):
        runner.execute_model(output([tokens - 74, tokens]))
    assert runner.did == ["replay", "plan", "replay", "replay"]
    assert runner.execute_model_state.attn_metadata == "plan"


def test_all_else_is_vllms() -> None:
    for runner in (Runner(), Runner(steady_steps=False, last_step=step([5, 70]))):
        assert runner.execute_model(output([5, 70])) == "vLLM's"
    other = Runner(last_step=step([5, 70]))
    assert other.execute_model(output([5, 70]), dummy_run=True) == "vLLM's"
    assert other.execute_model(output([5, 70])) == "vLLM's", "a dummy run writes where the step before had written"
    stage = Runner(last_step=step([5, 70]))
    assert stage.execute_model(output([5, 70]), None, True) == "vLLM's"


def test_nothing_follows_from_a_step_that_fails() -> None:
    def fail(graph: Any) -> None:
        raise RuntimeError("out of memory")

    runner = Runner(last_step=step([5, 70]))
    runner.cudagraph_manager.run_fullgraph = fail
    with pytest.raises(RuntimeError):
        runner.execute_model(output([5, 70]))
    assert runner.execute_model(output([5, 70])) == "vLLM's"


def followed(prepared: bool = True, mode: CUDAGraphMode = CUDAGraphMode.FULL, **more: Any) -> SteadyStep | None:
    """What can follow from a step of vLLM's, here one of two sequences of 4 and 69 tokens, in a graph for four."""
    pytest.importorskip("triton")
    runner, run = Runner(kv_cache_group=more.pop("kv_cache_group", 0)), batch([4, 69], 4, idx_mapping=None, **more)
    runner.execute_model_state = State(run, None, None, set())
    seen = run if prepared else batch([4, 69])
    runner.model_state.prepared = Prepared(seen, (), torch.zeros(1))
    runner.cudagraph_manager.dispatch = lambda *args, **options: SimpleNamespace(cg_mode=mode)
    table = SimpleNamespace(gpu=None)
    buffers: Any = SimpleNamespace(
        req_states=SimpleNamespace(num_computed_tokens=table, last_sampled_tokens=None),
        input_buffers=SimpleNamespace(input_ids=None, positions=None, seq_lens=None),
        block_tables=SimpleNamespace(block_tables=[table], slot_mappings=[None], block_sizes=[BLOCK]),
    )
    vars(runner).update(vars(buffers))
    return SteadyStep.of(runner)


def test_what_a_step_can_follow_from() -> None:
    found = followed()
    assert found is not None and found.computed == [5, 70]
    assert found.token.tolist() == [1, 1, 0, 0]
    assert followed(prepared=False) is None  # vLLM prepared something else since
    assert followed(mode=CUDAGraphMode.NONE) is None
    assert followed(num_tokens=3) is None
    assert followed(kv_cache_group=None) is None


def configuration(**more: Any) -> Any:
    values: dict[str, Any] = {
        "additional_config": {},
        "num_speculative_tokens": 0,
        "kv_transfer_config": None,
        "lora_config": None,
        "model_config": SimpleNamespace(enable_prompt_embeds=False),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=2
        ),
    }
    return SimpleNamespace(**values | more)


def test_configurations_whose_steps_do_more() -> None:
    assert steady_steps.takes(configuration())
    ranks: dict[str, Any] = vars(configuration().parallel_config)
    others: list[dict[str, Any]] = [
        {"additional_config": {"steady_steps": False}},
        {"additional_config": {"check_states": True}},
        {"num_speculative_tokens": 2},
        {"kv_transfer_config": object()},
        {"lora_config": object()},
        {"watermark_config": object()},
        {"model_config": SimpleNamespace(enable_prompt_embeds=True)},
        *({"parallel_config": SimpleNamespace(**ranks | {name: 2})} for name in ranks if not name.startswith("tensor")),
    ]
    for more in others:
        assert not steady_steps.takes(configuration(**more)), more
