"""Every state that a step goes on from holds the tokens before it: the real scheduler, and a worker that only counts.

The worker does to its block table and its blocks what vLLM's does: the table of a request only grows, and drafts leave
a state each. Its blocks hold the name of the prefix whose state they would. No model runs.
"""

import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

import vllm_kimi_linear
from tests.support.own_process import in_own_process
from tests.support.scheduling import GROUPS, configuration, scheduler

BLOCK = 256
LENGTH = 16384
BLOCKS = PLENTY, FEW = 4000, 110


class Worker:
    """States as prefixes: `states[group][block]` is a hash of the tokens whose state the block holds."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tables: dict[str, dict[int, list[int]]] = {}
        self.running: dict[str, int] = {}  # column of the running state
        self.accepted: dict[str, int] = {}
        self.states: dict[int, dict[int, int]] = {group: {} for group in GROUPS}
        self.hits = self.kept = 0

    def grow(self, step: SchedulerOutput) -> None:
        """Take the step's new blocks; a request that was preempted starts its table anew."""
        for new in step.scheduled_new_reqs:
            self._begin(new.req_id, new.block_ids, new.num_computed_tokens)
            self.hits += new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                assert blocks is not None
                self._begin(name, blocks, computed)
            elif blocks is not None:
                for group in GROUPS:
                    self.tables[name][group] += blocks[group]

    def _begin(self, name: str, blocks: tuple[list[int], ...], computed: int) -> None:
        self.tables[name] = {group: list(blocks[group]) for group in GROUPS}
        self.running[name], self.accepted[name] = (computed - 1) // BLOCK, 1

    def run(self, request: Request, scheduled: int, drafts: int, checkpoints: Any) -> int:
        """One request's part of a step; returns how many of its tokens stand."""
        name, context = request.request_id, request.num_computed_tokens - scheduled
        tokens = [*request.all_token_ids, *request.spec_token_ids]
        end = context + scheduled
        before, running = self.running[name], (end - 1) // BLOCK
        bias = self.accepted[name] - 1
        if before >= 0 and before != running:
            self._copy(name, before + bias, running)
            bias = 0
        decodes = context >= request.num_prompt_tokens and context >= request.num_tokens - 1
        prefix = self._prefixes(tokens, context, end)
        for group, table in self.tables[name].items():
            states = self.states[group]
            if context:
                assert states.get(table[running + bias]) == prefix(context), f"{name} from {context} in group {group}"
            if decodes:
                for i in range(scheduled):
                    states[table[running + i]] = prefix(context + i + 1)
            else:
                # As kernels do it in any order: no two of these may be one block.
                written = [table[running], *(checkpoints.blocks[group] if checkpoints else ())]
                assert len(set(written)) == len(written) and min(written) > 0
                states[table[running]] = prefix(end)
                if checkpoints:
                    self.kept += 1
                    for position, block in zip(checkpoints.positions, checkpoints.blocks[group], strict=True):
                        assert context < position < end
                        states[block] = prefix(position)
        accepted = self.random.randint(1, 1 + drafts) if end >= request.num_tokens else 0
        first = end - drafts  # tokens in the running column's first state
        edge = (first + max(accepted, 1) - 1) // BLOCK * BLOCK
        self.running[name], self.accepted[name] = running, max(accepted, 1)
        if edge >= first:
            if edge // BLOCK - 1 == running:
                self.accepted[name] = 1
            self._copy(name, running + edge - first, edge // BLOCK - 1)
        return accepted

    def _copy(self, name: str, source: int, target: int) -> None:
        for group, table in self.tables[name].items():
            self.states[group][table[target]] = self.states[group].get(table[source], 0)

    @staticmethod
    def _prefixes(tokens: list[int], context: int, end: int):
        known: dict[int, int] = {}

        def prefix(length: int) -> int:
            if length not in known:
                known[length] = hash(tuple(tokens[:length]))
            return known[length]

        return prefix


def requests(seed: int, count: int) -> Iterator[Request]:
    """Prompts of 1,000 to 9,000 tokens, half of which begin as another does."""
    draw = random.Random(seed)
    hasher = get_request_block_hasher(BLOCK, sha256)
    seen: list[list[int]] = []
    for i in range(count):
        prompt = [draw.randrange(1000) for _ in range(draw.randrange(1000, 9000))]
        if seen and i % 2:
            other = draw.choice(seen)
            shared = draw.randrange(len(other) + 1)
            prompt = (other[:shared] + prompt)[: max(shared, len(prompt))]
        seen.append(prompt)
        parameters = SamplingParams(max_tokens=draw.choice([1, 40, 400]), ignore_eos=True)
        yield Request(f"r{i}", prompt, parameters, None, block_hasher=hasher)


def serve(config: VllmConfig, drafts: int, budget: int, blocks: int, ranks: int) -> None:
    """Schedule requests until all are answered; raises AssertionError at the first state that is another's."""
    config.scheduler_config.max_num_batched_tokens = budget
    engine, worker = scheduler(config, BLOCK, blocks, ranks=ranks), Worker(seed=drafts)
    draw = random.Random(budget)
    for request in requests(seed=budget + drafts, count=10):
        engine.add_request(request)
    preempted = steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        step = engine.schedule()
        worker.grow(step)
        assert not step.kv_cache_block_copies, "a hit inside a block"
        names, answers, proposals = list(step.num_scheduled_tokens), [], []
        for name in names:
            request, scheduled = engine.requests[name], step.num_scheduled_tokens[name]
            drafted = step.scheduled_spec_decode_tokens.get(name, [])
            request.spec_token_ids = drafted
            stand = worker.run(request, scheduled, len(drafted), step.kda_checkpoints.get(name))
            # What stands of the drafts, and a token of the model's own.
            answers.append([*drafted[: stand - 1], draw.randrange(1000)] if stand else [])
            proposals.append([draw.randrange(1000) for _ in range(draw.randint(0, drafts))])
        engine.update_from_output(step, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, answers))
        if drafts:
            engine.update_draft_token_ids(DraftTokenIds(names, proposals))
        preempted += len(step.scheduled_cached_reqs.resumed_req_ids)
        if draw.random() < 0.005 and engine.requests:
            engine.finish_requests(draw.choice(list(engine.requests)), RequestStatus.FINISHED_ABORTED)
        if steps % 40 == 20 and engine.running:  # as if blocks had run out, whatever their number
            engine._preempt_request(engine.running.pop(), 0.0)
    assert preempted and worker.kept
    assert worker.hits or blocks == FEW
    pool = engine.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == blocks - 1  # one is vLLM's null block


CASES = [
    (drafts, budget, blocks, ranks)
    for drafts in (0, 1, 2, 4)
    for budget in (512, 1024, 4096)
    for blocks in BLOCKS
    for ranks in ((1, 2, 4) if drafts == 0 else (1,))
]


def serve_all(model: str) -> list[str]:
    """What went wrong in each of CASES; empty where nothing did."""
    vllm_kimi_linear.register()
    faults = []
    for drafts, budget, blocks, ranks in CASES:
        try:
            serve(configuration(model, LENGTH, drafts), drafts, budget, blocks, ranks)
            faults.append("")
        except AssertionError:
            faults.append(traceback.format_exc())
    return faults


def fill(model: str) -> list[int]:
    """Steps that prompts take, and once more with a turn behind, that fill all of a cache of vLLM's least size."""
    vllm_kimi_linear.register()
    found = []
    for budget in (2048, 4096, 8192, LENGTH):
        for blocks in range(LENGTH // BLOCK + 2 * len(GROUPS) + 1, 90, 3):
            config = configuration(model, LENGTH)
            config.scheduler_config.max_num_batched_tokens = budget
            engine, steps = scheduler(config, BLOCK, blocks), 0
            prompt = list(range(LENGTH - 1000))
            for turn in range(2):
                hasher = get_request_block_hasher(BLOCK, sha256)
                prompt += [turn] * 300
                engine.add_request(
                    Request(f"r{turn}", list(prompt), SamplingParams(max_tokens=9), None, block_hasher=hasher)
                )
                while engine.has_unfinished_requests():
                    steps += 1
                    assert steps < 100, f"{blocks} blocks, {budget} tokens a step: turn {turn} does not end"
                    names = list((step := engine.schedule()).num_scheduled_tokens)
                    ends = [engine.requests[name].num_computed_tokens >= len(prompt) for name in names]
                    answers = [[7] if end else [] for end in ends]
                    engine.update_from_output(
                        step, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, answers)
                    )
            found.append(steps)
    return found


def test_a_prompt_that_fills_the_cache_is_read(demo_model: Path):
    """Whatever states it would keep if there were room: the start says that such a length fits."""
    assert all(in_own_process(fill, str(demo_model)))


def load(model: str) -> list[list[int]]:
    """A prompt that got no blocks to be computed and is then loaded: blocks that it takes, and should; for each hit."""
    vllm_kimi_linear.register()
    found = []
    for hit in (2, 8, 15, 20):  # blocks
        engine = scheduler(configuration(model, LENGTH), BLOCK, PLENTY)
        connector = MagicMock(supports_divergent_local_hybrid_hits=False)
        connector.get_loaded_kv_cache_group_ids.return_value = (0, *GROUPS)
        connector.get_num_new_matched_tokens.side_effect = [(0, False), (hit * BLOCK, True)]
        engine.connector = connector
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request("r0", list(range(8000)), SamplingParams(max_tokens=5), None, block_hasher=hasher)
        engine.requests[request.request_id] = request
        engine.waiting.add_request(request)
        pool = engine.kv_cache_manager.block_pool
        taken = pool.get_new_blocks(PLENTY - 1 - 34)  # the prompt takes 35
        assert not engine.schedule().num_scheduled_tokens
        pool.free_blocks(taken)
        step = engine.schedule()
        assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and not step.kda_checkpoints
        found.append([PLENTY - 1 - pool.get_num_free_blocks(), hit + len(GROUPS)])
    return found


def test_a_prompt_that_waited_is_loaded_as_if_it_had_not(demo_model: Path):
    """What its first chunk was to keep is nothing to what a connector loads in its place."""
    for taken, wanted in in_own_process(load, str(demo_model)):
        assert taken == wanted


@pytest.fixture(scope="module")
def faults(demo_model: Path) -> list[str]:
    return in_own_process(serve_all, str(demo_model))


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{d} drafts, {t} tokens, {b} blocks, {r} ranks" for d, t, b, r in CASES]
)
def test_states_hold_what_is_before_them(faults: list[str], case: int):
    assert faults[case] == ""
