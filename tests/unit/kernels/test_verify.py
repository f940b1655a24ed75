"""Decode of several tokens at once, for every backend: the states and outputs of so many single steps."""

import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_kernels.types import KdaInputs, KdaState

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@dataclass
class Draft:
    """A problem whose sequences have K slots each, and how many of the tokens before were accepted."""

    problem: Any
    slots: Tensor
    accepted: Tensor

    def verify(self, backend):
        p = self.problem
        backend.verify(p.inputs, p.params, p.state, p.cu_seqlens, self.slots, self.accepted, p.out)
        return self


@pytest.fixture
def make_draft(make_problem):
    def make(lengths, steps, accepted, *, padding=0, null=(), state_dtype=torch.float32, **options):
        options = {"strided": True, "heads": 1} | options
        count = len(lengths)
        problem = make_problem([*lengths, padding], spare=count * steps + 2, slots=[0] * (count + 1), **options)
        problem.cu_seqlens = problem.cu_seqlens[:-1].clone()
        random = torch.Generator().manual_seed(1)
        slots = (torch.randperm(count * steps, generator=random) + 1).view(count, steps).to(torch.int32)
        for n, row in enumerate(slots.tolist()):
            if lengths[n] and n not in null:
                source = row[accepted[n] - 1]
                for name in ("conv", "recurrent"):
                    state = getattr(problem.state, name)[source]
                    state.copy_(torch.randn(state.shape, generator=random))
        slots[list(null), 0] = 0
        if state_dtype != torch.float32:
            problem.state = KdaState(problem.state.conv, problem.state.recurrent.to(state_dtype))
        return Draft(problem, slots.contiguous(), torch.tensor(accepted, dtype=torch.int32))

    return make


def step_by_step(draft, backend):
    """The same with `decode`, a token a call."""
    problem, bounds = draft.problem, draft.problem.cu_seqlens.tolist()
    problem.out.zero_()
    for n, slots in enumerate(draft.slots.tolist()):
        if slots[0] <= 0 or bounds[n] == bounds[n + 1]:
            continue
        before = slots[int(draft.accepted[n]) - 1]
        for row, slot in zip(range(bounds[n], bounds[n + 1]), slots, strict=False):
            for name in ("conv", "recurrent"):
                state = getattr(problem.state, name)
                state[slot] = state[before].clone()
            before, rows = slot, slice(row, row + 1)
            inputs = KdaInputs(*(getattr(problem.inputs, f.name)[rows] for f in fields(KdaInputs)))
            table = torch.tensor([slot], dtype=torch.int32, device=problem.out.device)
            backend.decode(inputs, problem.params, problem.state, table, problem.out[rows])


def check(draft, backend, solve, relative_error, tolerance=None):
    problem, before = draft.problem, draft.problem.clone()
    draft.verify(backend)
    tolerance = tolerance or TOLERANCE[problem.out.dtype]
    bounds, kept = problem.cu_seqlens.tolist(), {}
    want = torch.zeros_like(problem.out, dtype=torch.float64)
    for n, slots in enumerate(draft.slots.tolist()):
        start, end = bounds[n], bounds[n + 1]
        if slots[0] <= 0 or start == end:
            continue
        source = slots[int(draft.accepted[n]) - 1]
        before.slots[n] = source
        for count in range(1, end - start + 1):
            out, conv, recurrent = solve(before.part(start, start + count, n, resume=True))
            kept[slots[count - 1]] = (conv[source], recurrent[source])
        want[start:end] = out
    assert relative_error(problem.out, want) < tolerance
    assert (problem.out[want == 0] == 0).all()
    for slot in range(problem.state.conv.shape[0]):
        conv, recurrent = problem.state.conv[slot], problem.state.recurrent[slot]
        if slot in kept:
            assert torch.equal(conv.double(), kept[slot][0]), slot
            assert relative_error(recurrent, kept[slot][1]) < max(tolerance, 1e-5), slot
        else:
            torch.testing.assert_close(conv, before.state.conv[slot], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(recurrent, before.state.recurrent[slot], rtol=0, atol=0, equal_nan=True)


LENGTHS, ACCEPTED = [3, 0, 1, 4, 2, 4], [1, 4, 4, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(3, 64), (1, 128)])
def test_tokens_and_states(heads, dim, dtype, backend, make_draft, solve, relative_error):
    draft = make_draft(LENGTHS, 4, ACCEPTED, padding=9, null=[2], heads=heads, dim=dim, dtype=dtype)
    check(draft, backend, solve, relative_error)
    out = draft.problem.out
    store = out.as_strided((out.shape[0], out.stride(0)), out.stride())
    assert store[:, out.shape[1] :].isnan().all()  # nothing is written between the rows


@pytest.mark.parametrize("taps", [2, 3, 5])
@pytest.mark.parametrize("accepted", [1, 2, 6])
def test_taps_reach_into_the_slot_that_is_overwritten(accepted, taps, backend, make_draft, solve, relative_error):
    draft = make_draft([6], 6, [accepted], taps=taps, param_dtype=torch.bfloat16)
    check(draft, backend, solve, relative_error)


@pytest.mark.parametrize("z", [5.4375, -16.6, 1e30])
def test_hostile_gates(z, backend, make_draft, solve, relative_error):
    draft = make_draft([2, 3], 3, [3, 1])
    draft.problem.params.a_log.fill_(2.7725887)
    draft.problem.params.dt_bias.zero_()
    draft.problem.inputs.forget.fill_(z)
    check(draft, backend, solve, relative_error)


def test_sixteen_tokens(backend, make_draft, solve, relative_error):
    check(make_draft([16, 1], 16, [9, 16], dtype=torch.bfloat16), backend, solve, relative_error)


def test_bf16_state(backend, make_draft, solve, relative_error):
    if backend.__name__ == "kda_kernels.cpu":
        pytest.skip("keeps the state in fp32 only")
    draft = make_draft([2, 1], 2, [2, 1], state_dtype=torch.bfloat16)
    check(draft, backend, solve, relative_error, tolerance=1e-2)


def test_only_padding(backend, make_draft):
    for draft in (make_draft([0, 0], 3, [1, 1], padding=5), make_draft([], 3, [], padding=2)):
        draft.verify(backend)
        assert (draft.problem.out == 0).all() and draft.problem.state.conv.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_bits_of_decode(steps, dtype, backend, make_draft):
    lengths = [min(n, steps) for n in LENGTHS]
    draft = make_draft(lengths, steps, [min(n, steps) for n in ACCEPTED], dtype=dtype, padding=1)
    single = Draft(draft.problem.clone(), draft.slots, draft.accepted)
    draft.verify(backend)
    step_by_step(single, backend)
    got, want = draft.problem, single.problem
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.state.conv.nan_to_num(7), want.state.conv.nan_to_num(7))
    assert torch.equal(got.state.recurrent.nan_to_num(7), want.state.recurrent.nan_to_num(7))


def test_speculation_leaves_no_trace(backend, make_problem):
    """Drafts of three tokens, of which one, two or three are right: the same bits as decode of the right ones."""
    right = make_problem([1] * 6, heads=1, slots=[1, 0, 0, 0, 0, 0], resume=[True] + [False] * 5)
    wrong = make_problem([1] * 6, heads=1, slots=[1, 0, 0, 0, 0, 0], resume=[True] + [False] * 5, seed=1)
    plain, table = right.clone(), torch.tensor([1], dtype=torch.int32)
    for row in range(6):
        backend.decode(rows(plain, [row]), plain.params, plain.state, table, plain.out[row : row + 1])
    slots, state, accepted, done = torch.tensor([[1, 2, 3]], dtype=torch.int32), right.state, 1, 0
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    for count in (1, 3, 2):
        drafted = rows(right, [done, min(done + 1, 5), min(done + 2, 5)])
        for name in ("qkv", "forget", "beta", "gate"):
            getattr(drafted, name)[count:] = getattr(wrong.inputs, name)[:1]
        out = torch.empty(3, right.out.shape[1])
        backend.verify(drafted, right.params, state, bounds, slots, torch.tensor([accepted], dtype=torch.int32), out)
        assert torch.equal(out[:count], plain.out[done : done + count])
        accepted, done = count, done + count
    assert torch.equal(state.recurrent[accepted], plain.state.recurrent[1])
    assert torch.equal(state.conv[accepted], plain.state.conv[1])


def rows(problem, picked):
    return KdaInputs(*(getattr(problem.inputs, f.name)[picked].clone() for f in fields(KdaInputs)))


@pytest.mark.parametrize("options", [{"BV": 16, "INNER": 64}, {"BV": 32, "INNER": 32}, {"BV": 128, "INNER": 128}])
def test_tiles(options, backend, make_draft, solve, relative_error, monkeypatch):
    if backend.__name__ != "kda_kernels.cuda":
        pytest.skip("has none")
    module = sys.modules["kda_kernels.cuda.verify"]
    monkeypatch.setattr(module, "_launch", lambda *_, **__: {"PDL": False, "num_warps": 4} | options)
    check(make_draft([3, 2], 3, [2, 1], dim=128), backend, solve, relative_error)


BROKEN = {
    "cu_seqlens gives a sequence 3 tokens; slots has 2 for each": lambda d: d.problem.cu_seqlens[1:].fill_(3),
    "cu_seqlens runs from 0 to 9; it must run from 0 to at most 4": lambda d: d.problem.cu_seqlens[2:].fill_(9),
    "cu_seqlens falls from 2 to 1": lambda d: d.problem.cu_seqlens[2:].fill_(1),
    "accepted holds 0; it must lie between 1 and 2": lambda d: d.accepted.fill_(0),
    "accepted holds 3": lambda d: d.accepted.fill_(3),
    "slots holds 2 twice": lambda d: d.slots.copy_(torch.tensor([[1, 2], [2, 3]])),
    "slots holds 50; the state has": lambda d: d.slots.fill_(50),
    "slots holds 0 beside 1; a sequence needs a slot for each token": lambda d: d.slots.copy_(
        torch.tensor([[1, 0], [2, 3]])
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_tables_are_refused_before_anything_is_written(sentence, backend, make_draft):
    if backend.__name__ == "kda_kernels.cuda":
        pytest.skip("does not read the tables on the host")
    draft = make_draft([2, 2], 2, [1, 2])
    BROKEN[sentence](draft)
    with pytest.raises(ValueError, match=sentence):
        draft.verify(backend)
    assert draft.problem.out.isnan().all()


WRONG_KIND = {
    r"slots is torch\.int32 \[4\]": lambda d: setattr(d, "slots", d.slots.flatten()),
    r"slots is torch\.int64 \[2, 2\]": lambda d: setattr(d, "slots", d.slots.long()),
    r"accepted is torch\.int32 \[1\]": lambda d: setattr(d, "accepted", d.accepted[:1]),
    r"cu_seqlens is torch\.int64": lambda d: setattr(d.problem, "cu_seqlens", d.problem.cu_seqlens.long()),
}


@pytest.mark.parametrize("sentence", WRONG_KIND)
def test_tables_of_the_wrong_kind_are_refused(sentence, backend, make_draft):
    draft = make_draft([2, 2], 2, [1, 2])
    WRONG_KIND[sentence](draft)
    with pytest.raises(ValueError, match=sentence):
        draft.verify(backend)
