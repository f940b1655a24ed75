"""States stored from within a prefill, for every backend: those of the shorter prefills that end there."""

import os
import sys

import pytest
import torch

from kda_kernels.interface import KdaState, PrefillCheckpoints

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
# Triton's interpreter takes ten seconds a case: there the same code in another dtype or size is for the soak.
SOAK = [pytest.mark.soak] if os.environ.get("TRITON_INTERPRET") == "1" else []
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=SOAK)]
LENGTHS = [2, 130, 0, 60, 3, 64]
HAS_INITIAL_STATE = [True, True, False, False, True, True]
STATE_INDICES = [4, 1, 3, 2, 5, 6]
# Tokens behind a sequence's whole chunks or at its end, out of order, some twice; 132 to 192 have one of 60.
POINTS = {195: [11], 2: [7], 66: [8, 13, 9], 132: [10], 192: [14], 130: [12], 259: [15], 1: [0, -2]}


def checkpoints_of(points):
    pairs = [(offset, index) for offset, indices in points.items() for index in indices]
    return PrefillCheckpoints(*(torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True)))


def check(problem, points, backend, solve, relative_error, tolerance=None):
    before = problem.clone()
    out, conv, recurrent = solve(problem)
    problem.prefill(backend, checkpoints_of(points))
    tolerance = tolerance or TOLERANCE[problem.out.dtype]
    assert relative_error(problem.out, out) < tolerance
    bounds, state_indices, kept = problem.cu_seqlens.tolist(), problem.state_indices.tolist(), {}
    for n, state_index in enumerate(state_indices):
        if state_index <= 0:
            continue
        kept[state_index] = (conv[state_index], recurrent[state_index])
        for row, targets in points.items():
            if bounds[n] < row <= bounds[n + 1]:
                part = before.part(bounds[n], row, n, has_initial_state=bool(before.has_initial_state[n]))
                short = solve(part)
                kept |= {target: (short[1][state_index], short[2][state_index]) for target in targets if target > 0}
    for state_index in range(problem.state.conv.shape[0]):
        if state_index in kept:
            assert torch.equal(problem.state.conv[state_index].double(), kept[state_index][0]), state_index
            assert relative_error(problem.state.recurrent[state_index], kept[state_index][1]) < tolerance, state_index
        else:
            for name in ("conv", "recurrent"):
                now, then = getattr(problem.state, name)[state_index], getattr(before.state, name)[state_index]
                torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def make(make_problem, **options):
    options = {
        "heads": 1,
        "state_indices": STATE_INDICES,
        "has_initial_state": HAS_INITIAL_STATE,
        "spare": 10,
        "strided": True,
    } | options
    return make_problem(LENGTHS, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim", [(2, 64), pytest.param(1, 128, marks=SOAK)])
def test_states_at_rows(heads, dim, dtype, backend, make_problem, solve, relative_error):
    problem = make(make_problem, heads=heads, dim=dim, dtype=dtype)
    check(problem, POINTS, backend, solve, relative_error)


@pytest.mark.parametrize("conv_kernel_size", [pytest.param(2, marks=SOAK), 5])
def test_other_kernel_sizes(conv_kernel_size, backend, make_problem, solve, relative_error):
    check(make(make_problem, conv_kernel_size=conv_kernel_size), POINTS, backend, solve, relative_error)


@pytest.mark.parametrize("z", [5.4375, pytest.param(-16.6, marks=SOAK), pytest.param(1e30, marks=SOAK)])
def test_hostile_gates(z, backend, make_problem, solve, relative_error):
    problem = make(make_problem)
    problem.params.A_log.fill_(2.7725887)
    problem.params.dt_bias.zero_()
    problem.inputs.g.fill_(z)
    check(problem, POINTS, backend, solve, relative_error)


def test_every_row(backend, make_problem, solve, relative_error):
    if backend.__name__ == "kda_kernels.cuda":
        pytest.skip("keeps states between chunks only")
    problem = make_problem([3, 20, 1], has_initial_state=[False, True, True], state_indices=[3, 1, 2], spare=26)
    check(problem, {row: [row + 3] for row in range(1, 25)}, backend, solve, relative_error)


def test_bf16_state(backend, make_problem, solve, relative_error):
    if backend.__name__ == "kda_kernels.cpu":
        pytest.skip("keeps the state in fp32 only")
    problem = make(make_problem)
    problem.state = KdaState(problem.state.conv, problem.state.recurrent.bfloat16())
    check(problem, POINTS, backend, solve, relative_error, tolerance=1e-2)


def test_null_sequences_store_nothing(backend, make_problem, solve, relative_error):
    problem = make(make_problem, state_indices=[4, 0, 3, 2, -1, 6])
    check(problem, POINTS, backend, solve, relative_error)


def test_no_checkpoints_at_all(backend, make_problem, solve, relative_error):
    problem, same = make_problem([20], heads=1), make_problem([20], heads=1)
    nothing = torch.empty(0, dtype=torch.int32)
    problem.prefill(backend, PrefillCheckpoints(nothing, nothing))
    same.prefill(backend)
    assert torch.equal(problem.out, same.out)


def test_a_sequence_goes_on_from_a_checkpoint(backend, make_problem, relative_error):
    """What a prefix cache does: the rest of a prompt from a state stored on the way of another."""
    whole = make_problem([150], heads=1, state_indices=[1], spare=4)
    rest = whole.clone()
    whole.prefill(backend, checkpoints_of({64: [3], 128: [4]}))
    rest.state = KdaState(whole.state.conv.clone(), whole.state.recurrent.clone())
    for start, state_index in ((64, 3), (128, 4)):
        rest.state_indices[0] = state_index
        rest.part(start, 150, 0, has_initial_state=True).prefill(backend)
        assert relative_error(rest.out[start:], whole.out[start:]) < 1e-5
        assert torch.equal(rest.state.conv[state_index], whole.state.conv[1])
        assert relative_error(rest.state.recurrent[state_index], whole.state.recurrent[1]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "part, length", [pytest.param(64, 0, marks=SOAK), pytest.param(1 << 19, 1, marks=SOAK), (128, 2)]
)
def test_in_parts_and_segments(part, length, dtype, backend, make_problem, solve, relative_error, monkeypatch):
    if backend.__name__ != "kda_kernels.cuda":
        pytest.skip("has neither")
    module = sys.modules["kda_kernels.cuda.prefill"]
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr(module, "_segment_length", lambda *_: length)
    points = POINTS | {66 + 64: [12, 20], 66 + 193: [15, 19]}
    check(make(make_problem, spare=15, dtype=dtype), points, backend, solve, relative_error)


BROKEN = {
    "checkpoints.state_indices holds 99; the cache has states 0 to 15": lambda e: e.state_indices.fill_(99),
    "checkpoints.state_indices holds 4 twice": lambda e: e.state_indices.copy_(torch.tensor([4, 8])),
    "checkpoints.state_indices holds 8 twice": lambda e: e.state_indices.fill_(8),
    "checkpoints.checkpoint_offsets holds 0; it must lie between 1 and 259": lambda e: e.checkpoint_offsets.fill_(0),
    "checkpoints.checkpoint_offsets holds 260": lambda e: e.checkpoint_offsets.fill_(260),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_checkpoints_are_refused_before_anything_is_written(sentence, backend, make_problem):
    if backend.__name__ == "kda_kernels.cuda":
        pytest.skip("does not read the tables on the host")
    problem, checkpoints = make(make_problem), checkpoints_of({66: [8], 2: [9]})
    BROKEN[sentence](checkpoints)
    with pytest.raises(ValueError, match=sentence):
        problem.prefill(backend, checkpoints)
    assert problem.out.isnan().all()


def test_tables_of_the_wrong_kind_are_refused():
    ok = torch.ones(2, dtype=torch.int32)
    for offsets, indices, sentence in (
        (ok.long(), ok, r"checkpoints\.checkpoint_offsets is torch\.int64 \[2\]; it must be contiguous int32"),
        (ok, ok[None], r"checkpoints\.state_indices is torch\.int32 \[1, 2\]"),
        (ok, ok[:1], r"checkpoints\.checkpoint_offsets is \[2\] on cpu, checkpoints\.state_indices \[1\] on cpu; they"),
    ):
        with pytest.raises(ValueError, match=sentence):
            PrefillCheckpoints(offsets, indices)
