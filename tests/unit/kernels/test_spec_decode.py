"""Decode of several tokens at once, for every backend: the states and outputs of so many single steps."""

import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_kernels.interface import DecodeArgs, KdaInputs, KdaState, SpecDecodeArgs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@dataclass
class SpecProblem:
    """A problem whose sequences have K states each, and how many of the tokens before were accepted."""

    problem: Any
    state_indices: Tensor
    num_accepted_tokens: Tensor

    def spec_decode(self, backend):
        p = self.problem
        tables = (p.cu_seqlens, self.state_indices, self.num_accepted_tokens)
        backend.spec_decode(SpecDecodeArgs(p.inputs, p.params, p.state, *tables, p.out))
        return self


@pytest.fixture
def make_spec(make_problem):
    def make(lengths, steps, num_accepted_tokens, *, padding=0, null=(), state_dtype=torch.float32, **options):
        options = {"strided": True, "heads": 1} | options
        count = len(lengths)
        problem = make_problem([*lengths, padding], spare=count * steps + 2, state_indices=[0] * (count + 1), **options)
        problem.cu_seqlens = problem.cu_seqlens[:-1].clone()
        random = torch.Generator().manual_seed(1)
        state_indices = (torch.randperm(count * steps, generator=random) + 1).view(count, steps).to(torch.int32)
        for n, row in enumerate(state_indices.tolist()):
            if lengths[n] and n not in null:
                source = row[num_accepted_tokens[n] - 1]
                for name in ("conv", "recurrent"):
                    state = getattr(problem.state, name)[source]
                    state.copy_(torch.randn(state.shape, generator=random))
        state_indices[list(null), 0] = 0
        if state_dtype != torch.float32:
            problem.state = KdaState(problem.state.conv, problem.state.recurrent.to(state_dtype))
        return SpecProblem(problem, state_indices.contiguous(), torch.tensor(num_accepted_tokens, dtype=torch.int32))

    return make


def step_by_step(spec, backend):
    """The same with `decode`, a token a call."""
    problem, bounds = spec.problem, spec.problem.cu_seqlens.tolist()
    problem.out.zero_()
    for n, state_indices in enumerate(spec.state_indices.tolist()):
        if state_indices[0] <= 0 or bounds[n] == bounds[n + 1]:
            continue
        before = state_indices[int(spec.num_accepted_tokens[n]) - 1]
        for row, state_index in zip(range(bounds[n], bounds[n + 1]), state_indices, strict=False):
            for name in ("conv", "recurrent"):
                state = getattr(problem.state, name)
                state[state_index] = state[before].clone()
            before, tokens = state_index, slice(row, row + 1)
            inputs = problem.inputs[tokens]
            table = torch.tensor([state_index], dtype=torch.int32, device=problem.out.device)
            backend.decode(DecodeArgs(inputs, problem.params, problem.state, table, problem.out[tokens]))


def check(spec, backend, solve, relative_error, tolerance=None):
    problem, before = spec.problem, spec.problem.clone()
    spec.spec_decode(backend)
    tolerance = tolerance or TOLERANCE[problem.out.dtype]
    bounds, kept = problem.cu_seqlens.tolist(), {}
    want = torch.zeros_like(problem.out, dtype=torch.float64)
    for n, state_indices in enumerate(spec.state_indices.tolist()):
        start, end = bounds[n], bounds[n + 1]
        if state_indices[0] <= 0 or start == end:
            continue
        source = state_indices[int(spec.num_accepted_tokens[n]) - 1]
        before.state_indices[n] = source
        for count in range(1, end - start + 1):
            out, conv, recurrent = solve(before.part(start, start + count, n, has_initial_state=True))
            kept[state_indices[count - 1]] = (conv[source], recurrent[source])
        want[start:end] = out
    assert relative_error(problem.out, want) < tolerance
    assert (problem.out[want == 0] == 0).all()
    for state_index in range(problem.state.conv.shape[0]):
        conv, recurrent = problem.state.conv[state_index], problem.state.recurrent[state_index]
        if state_index in kept:
            assert torch.equal(conv.double(), kept[state_index][0]), state_index
            assert relative_error(recurrent, kept[state_index][1]) < max(tolerance, 1e-5), state_index
        else:
            torch.testing.assert_close(conv, before.state.conv[state_index], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(recurrent, before.state.recurrent[state_index], rtol=0, atol=0, equal_nan=True)


LENGTHS, ACCEPTED = [3, 0, 1, 4, 2, 4], [1, 4, 4, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(3, 64), (1, 128)])
def test_tokens_and_states(heads, dim, dtype, backend, make_spec, solve, relative_error):
    spec = make_spec(LENGTHS, 4, ACCEPTED, padding=9, null=[2], heads=heads, dim=dim, dtype=dtype)
    check(spec, backend, solve, relative_error)
    out = spec.problem.out
    store = out.as_strided((out.shape[0], out.stride(0)), out.stride())
    assert store[:, out.shape[1] :].isnan().all()  # nothing is written between the tokens


@pytest.mark.parametrize("conv_kernel_size", [2, 3, 5])
@pytest.mark.parametrize("accepted", [1, 2, 6])
def test_convolution_reaches_into_the_state_that_is_overwritten(
    accepted, conv_kernel_size, backend, make_spec, solve, relative_error
):
    spec = make_spec([6], 6, [accepted], conv_kernel_size=conv_kernel_size, param_dtype=torch.bfloat16)
    check(spec, backend, solve, relative_error)


@pytest.mark.parametrize("z", [5.4375, -16.6, 1e30])
def test_hostile_gates(z, backend, make_spec, solve, relative_error):
    spec = make_spec([2, 3], 3, [3, 1])
    spec.problem.params.A_log.fill_(2.7725887)
    spec.problem.params.dt_bias.zero_()
    spec.problem.inputs.g.fill_(z)
    check(spec, backend, solve, relative_error)


def test_sixteen_tokens(backend, make_spec, solve, relative_error):
    check(make_spec([16, 1], 16, [9, 16], dtype=torch.bfloat16), backend, solve, relative_error)


def test_bf16_state(backend, make_spec, solve, relative_error):
    if backend.__name__ == "kda_kernels.cpu":
        pytest.skip("keeps the state in fp32 only")
    spec = make_spec([2, 1], 2, [2, 1], state_dtype=torch.bfloat16)
    check(spec, backend, solve, relative_error, tolerance=1e-2)


def test_only_padding(backend, make_spec):
    for spec in (make_spec([0, 0], 3, [1, 1], padding=5), make_spec([], 3, [], padding=2)):
        spec.spec_decode(backend)
        assert (spec.problem.out == 0).all() and spec.problem.state.conv.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_bits_of_decode(steps, dtype, backend, make_spec):
    lengths = [min(n, steps) for n in LENGTHS]
    spec = make_spec(lengths, steps, [min(n, steps) for n in ACCEPTED], dtype=dtype, padding=1)
    single = SpecProblem(spec.problem.clone(), spec.state_indices, spec.num_accepted_tokens)
    spec.spec_decode(backend)
    step_by_step(single, backend)
    got, want = spec.problem, single.problem
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.state.conv.nan_to_num(7), want.state.conv.nan_to_num(7))
    assert torch.equal(got.state.recurrent.nan_to_num(7), want.state.recurrent.nan_to_num(7))


def test_speculation_leaves_no_trace(backend, make_problem):
    """Drafts of three tokens, of which one, two or three are right: the same bits as decode of the right ones."""
    right = make_problem([1] * 6, heads=1, state_indices=[1, 0, 0, 0, 0, 0], has_initial_state=[True] + [False] * 5)
    wrong = make_problem(
        [1] * 6, heads=1, state_indices=[1, 0, 0, 0, 0, 0], has_initial_state=[True] + [False] * 5, seed=1
    )
    plain, table = right.clone(), torch.tensor([1], dtype=torch.int32)
    for row in range(6):
        backend.decode(DecodeArgs(inputs_of(plain, [row]), plain.params, plain.state, table, plain.out[row : row + 1]))
    indices, state, accepted, done = torch.tensor([[1, 2, 3]], dtype=torch.int32), right.state, 1, 0
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    for count in (1, 3, 2):
        drafted = inputs_of(right, [done, min(done + 1, 5), min(done + 2, 5)])
        for name in ("qkv", "g", "beta", "output_gate"):
            getattr(drafted, name)[count:] = getattr(wrong.inputs, name)[:1]
        out = torch.empty(3, right.out.shape[1])
        tables = (bounds, indices, torch.tensor([accepted], dtype=torch.int32))
        backend.spec_decode(SpecDecodeArgs(drafted, right.params, state, *tables, out))
        assert torch.equal(out[:count], plain.out[done : done + count])
        accepted, done = count, done + count
    assert torch.equal(state.recurrent[accepted], plain.state.recurrent[1])
    assert torch.equal(state.conv[accepted], plain.state.conv[1])


def inputs_of(problem, picked):
    return KdaInputs(*(getattr(problem.inputs, f.name)[picked].clone() for f in fields(KdaInputs)))


@pytest.mark.parametrize("options", [{"BV": 16, "INNER": 64}, {"BV": 32, "INNER": 32}, {"BV": 128, "INNER": 128}])
def test_tiles(options, backend, make_spec, solve, relative_error, monkeypatch):
    if backend.__name__ != "kda_kernels.cuda":
        pytest.skip("has none")
    module = sys.modules["kda_kernels.cuda.spec_decode"]
    monkeypatch.setattr(module, "_launch", lambda *_, **__: {"PDL": False, "num_warps": 4} | options)
    check(make_spec([3, 2], 3, [2, 1], dim=128), backend, solve, relative_error)


BROKEN = {
    "cu_seqlens gives a sequence 3 tokens; state_indices has 2 for each": lambda d: d.problem.cu_seqlens[1:].fill_(3),
    "cu_seqlens runs from 0 to 9; it must run from 0 to at most 4": lambda d: d.problem.cu_seqlens[2:].fill_(9),
    "cu_seqlens falls from 2 to 1": lambda d: d.problem.cu_seqlens[2:].fill_(1),
    "num_accepted_tokens holds 0; it must lie between 1 and 2": lambda d: d.num_accepted_tokens.fill_(0),
    "num_accepted_tokens holds 3": lambda d: d.num_accepted_tokens.fill_(3),
    "state_indices holds 2 twice": lambda d: d.state_indices.copy_(torch.tensor([[1, 2], [2, 3]])),
    "state_indices holds 50; the cache has": lambda d: d.state_indices.fill_(50),
    "state_indices holds 0 beside 1; a sequence needs a state for each token": lambda d: d.state_indices.copy_(
        torch.tensor([[1, 0], [2, 3]])
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_tables_are_refused_before_anything_is_written(sentence, backend, make_spec):
    if backend.__name__ == "kda_kernels.cuda":
        pytest.skip("does not read the tables on the host")
    spec = make_spec([2, 2], 2, [1, 2])
    BROKEN[sentence](spec)
    with pytest.raises(ValueError, match=sentence):
        spec.spec_decode(backend)
    assert spec.problem.out.isnan().all()


WRONG_KIND = {
    r"state_indices is torch\.int32 \[4\]": lambda d: setattr(d, "state_indices", d.state_indices.flatten()),
    r"state_indices is torch\.int64 \[2, 2\]": lambda d: setattr(d, "state_indices", d.state_indices.long()),
    r"num_accepted_tokens is torch\.int32 \[1\]": lambda d: setattr(
        d, "num_accepted_tokens", d.num_accepted_tokens[:1]
    ),
    r"cu_seqlens is torch\.int64": lambda d: setattr(d.problem, "cu_seqlens", d.problem.cu_seqlens.long()),
}


@pytest.mark.parametrize("sentence", WRONG_KIND)
def test_tables_of_the_wrong_kind_are_refused(sentence, backend, make_spec):
    spec = make_spec([2, 2], 2, [1, 2])
    WRONG_KIND[sentence](spec)
    with pytest.raises(ValueError, match=sentence):
        spec.spec_decode(backend)
