"""A runner whose steps go on from the step before, beside vLLM's own: the real scheduler, runner and kernels.

Triton's interpreter stands for the GPU. What a graph would read is compared at every replay: all of it was written for
the step by vLLM's runner, and most of it for an earlier one by ours.
"""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_kimi_linear
from tests.support.own_process import in_own_process

BLOCK, LENGTH, SEQUENCES = 64, 2048, 4
BLOCKS, SEED = 60, 4


def requests(seed: int, count: int) -> Iterator[Any]:
    """Short prompts, a third of which begin as another does, and answers of up to 150 tokens."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    draw, hasher, seen = random.Random(seed), get_request_block_hasher(BLOCK, sha256), [[1, 2]]
    for i in range(count):
        begun = draw.choice(seen) if i % 3 == 1 else []
        seen.append(begun + [draw.randrange(1000) for _ in range(draw.randrange(1, 100))])
        parameters = SamplingParams(max_tokens=draw.choice([1, 5, 80, 150]), ignore_eos=True, temperature=0)
        yield Request(f"r{i}", seen[-1], parameters, None, block_hasher=hasher)


def dummy_step(requests: int) -> Any:
    """A step that vLLM makes up, as it does between others where engines run in step."""
    from vllm.v1.core.sched.output import SchedulerOutput

    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {f"_dummy_req_{i}": 1 for i in range(requests)}
    step.total_num_scheduled_tokens = requests
    return step


def same(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def compare(vllms: Any, ours: Any) -> None:
    """What a graph read of the two, if one was replayed, and what the host knows of the step."""
    one, other = vllms.cudagraph_manager.take(), ours.cudagraph_manager.take()
    assert (one is None) == (other is None)
    if one is not None:
        assert one[0] == other[0]
        for name, value in one[1].items():
            assert same(value, other[1][name]), (name, value, other[1][name])
    if vllms.execute_model_state is not None:
        batches = [runner.execute_model_state.input_batch for runner in (vllms, ours)]
        for field in dataclasses.fields(batches[0]):
            values = [getattr(batch, field.name) for batch in batches]
            assert field.name == "logits_indices" or same(*values), (field.name, *values)


def serve(model: str) -> dict[str, int]:
    """How often what was, while two runners answered requests until none was left; AssertionError where they differ."""
    from tests.support import interpreted_runner
    from tests.support.scheduling import configuration, scheduler

    vllm_kimi_linear.register()
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    from vllm_kimi_linear.steady_steps import go_on

    config = configuration(model, LENGTH)
    config.additional_config["steady_steps"] = True
    config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = 128, SEQUENCES
    engine = scheduler(config, BLOCK, BLOCKS, AsyncScheduler)
    engine.use_v2_model_runner = True
    vllms, ours = (interpreted_runner.runner(config, engine.kv_cache_config, SEQUENCES, LENGTH) for _ in range(2))
    run = type(vllms).execute_model
    run_ours = go_on(run)
    draw, waiting = random.Random(SEED), list(requests(SEED, 9))
    count = dict.fromkeys(("steps", "went on", "cached", "preempted", "aborted", "dummy runs"), 0)
    under_way = None
    with torch.inference_mode():
        while waiting or under_way or engine.has_requests():
            count["steps"] += 1
            if waiting and (draw.random() < 0.06 or not engine.has_unfinished_requests()):
                engine.add_request(waiting.pop(0))
            step = engine.schedule()
            count["preempted"] += bool(step.preempted_req_ids)
            count["cached"] += sum(new.num_computed_tokens > 0 for new in step.scheduled_new_reqs)
            run(vllms, step)
            run_ours(ours, step)
            compare(vllms, ours)
            answer = None
            if step.total_num_scheduled_tokens:
                names, tokens = interpreted_runner.sample(vllms)
                assert (names, tokens) == interpreted_runner.sample(ours)
                answer = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
            # As the engine does it: a step is scheduled before the answers of the one before are there.
            if under_way:
                engine.update_from_output(*under_way)
            under_way = (step, answer) if answer else None
            if engine.running and draw.random() < 0.02:
                count["aborted"] += 1
                engine.finish_requests(draw.choice(engine.running).request_id, RequestStatus.FINISHED_ABORTED)
            if engine.running and count["steps"] % 40 == 25:  # as if blocks had run out, whatever their number
                engine._preempt_request(engine.running.pop(), 0.0)
            if draw.random() < 0.02:
                count["dummy runs"] += 1
                for runner, execute in ((vllms, run), (ours, run_ours)):
                    execute(runner, dummy_step(SEQUENCES), dummy_run=True)
                    runner.execute_model_state = None
    count["went on"] = vllms.prepared - ours.prepared
    return count


def test_what_a_graph_reads_is_what_vllm_would_have_written(demo_model: Path) -> None:
    pytest.importorskip("triton")
    count = in_own_process(serve, str(demo_model), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert count["went on"] > count["steps"] // 2 and all(count.values()), count
