"""What `decode` and `prefill` promise, for every backend that runs here."""

import pytest
import torch

from tests.unit.kernels.hostile import HOSTILE

LENGTHS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def check(problem, backend, solve, relative_error, call="prefill"):
    want_out, want_conv, want_recurrent = solve(problem)
    before = problem.clone()
    getattr(problem, call)(backend)
    tolerance = TOLERANCE[problem.out.dtype]
    live = [state_index for state_index in problem.state_indices.tolist() if state_index > 0]
    assert relative_error(problem.out, want_out) < tolerance
    assert torch.equal(problem.state.conv[live].double(), want_conv[live])
    assert relative_error(problem.state.recurrent[live], want_recurrent[live]) < 1e-5
    others = [state_index for state_index in range(problem.state.conv.shape[0]) if state_index not in live]
    for name in ("conv", "recurrent"):
        now, then = getattr(problem.state, name)[others], getattr(before.state, name)[others]
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_initial_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_of_every_length(length, has_initial_state, dtype, backend, make_problem, solve, relative_error):
    check(
        make_problem([length], dim=32, dtype=dtype, has_initial_state=has_initial_state), backend, solve, relative_error
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_prefill(hostile, dtype, backend, make_problem, solve, relative_error):
    problem = make_problem([40, 1, 33], dtype=dtype, has_initial_state=[True, True, False])
    HOSTILE[hostile](problem)
    check(problem, backend, solve, relative_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_decode(hostile, dtype, backend, make_problem, solve, relative_error):
    problem = make_problem([1] * 5, dtype=dtype, has_initial_state=True)
    HOSTILE[hostile](problem)
    check(problem, backend, solve, relative_error, "decode")


@pytest.mark.parametrize("dim", [16, 48, 64, 128, 144])
@pytest.mark.parametrize("conv_kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_head_sizes_and_taps(call, dim, conv_kernel_size, backend, make_problem, solve, relative_error):
    lengths = [1, 1, 1] if call == "decode" else [1, 18, 2]
    problem = make_problem(lengths, dim=dim, conv_kernel_size=conv_kernel_size, has_initial_state=True)
    check(problem, backend, solve, relative_error, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_views_with_gaps_and_bf16_params(call, dtype, backend, make_problem, solve, relative_error):
    lengths = [1] * 4 if call == "decode" else [5, 20, 1, 7]
    problem = make_problem(lengths, strided=True, has_initial_state=True, dtype=dtype, param_dtype=torch.bfloat16)
    check(problem, backend, solve, relative_error, call)
    store = problem.out.as_strided((problem.out.shape[0], problem.out.stride(0)), problem.out.stride())
    assert store[:, problem.out.shape[1] :].isnan().all()  # nothing is written between the tokens


def test_many_sequences_of_one_token(backend, make_problem, solve, relative_error):
    has_initial_state = [n % 3 > 0 for n in range(40)]
    check(make_problem([1] * 40, dim=16, has_initial_state=has_initial_state), backend, solve, relative_error)


@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_null_slots_give_zeros_and_touch_nothing(call, backend, make_problem, solve, relative_error):
    lengths = [1] * 5 if call == "decode" else [3, 20, 1, 2, 17]
    problem = make_problem(lengths, dim=32, state_indices=[0, 5, -1, 0, 2], has_initial_state=True)
    check(problem, backend, solve, relative_error, call)
    bounds = problem.cu_seqlens.tolist()
    for n in (0, 2, 3):
        assert (problem.out[bounds[n] : bounds[n + 1]] == 0).all()


def test_no_rows_at_all(backend, make_problem):
    problem = make_problem([], dim=16)
    problem.prefill(backend).decode(backend)
    assert problem.state.conv.isnan().all()


@pytest.mark.parametrize("sizes", [[1] * 70, [3, 67], [64, 6], [16, 1, 16, 37], [33, 37]])
def test_chunks_continue_one_another(sizes, backend, make_problem, relative_error):
    whole = make_problem([70], dim=32)
    pieces = whole.clone()
    whole.prefill(backend)
    start = 0
    for size in sizes:
        pieces.part(start, start + size, 0, has_initial_state=start > 0).prefill(backend)
        start += size
    assert relative_error(pieces.out, whole.out) < 1e-5
    state_index = int(whole.state_indices[0])
    assert torch.equal(pieces.state.conv[state_index], whole.state.conv[state_index])
    assert relative_error(pieces.state.recurrent[state_index], whole.state.recurrent[state_index]) < 1e-5


def test_nan_in_one_sequence_stays_there(backend, make_problem):
    problem = make_problem([5, 20], dim=32)
    problem.inputs.qkv[2] = torch.nan
    problem.prefill(backend)
    assert problem.out[2].isnan().all()
    assert problem.out[:2].isfinite().all() and problem.out[5:].isfinite().all()


BROKEN = {
    "state_indices holds 9": lambda p: p.state_indices.fill_(9),
    "state_indices holds 1 twice": lambda p: p.state_indices.fill_(1),
    "cu_seqlens falls from 6 to 4": lambda p: p.cu_seqlens.copy_(torch.tensor([0, 6, 4])),
    "cu_seqlens runs from 1 to 4": lambda p: p.cu_seqlens.copy_(torch.tensor([1, 2, 4])),
    "cu_seqlens runs from 0 to 7": lambda p: p.cu_seqlens.copy_(torch.tensor([0, 2, 7])),
    "state_indices is torch.int64": lambda p: setattr(p, "state_indices", p.state_indices.long()),
    "state_indices is torch.int32 \\[1\\]": lambda p: setattr(p, "state_indices", p.state_indices[:1]),
    "has_initial_state is torch.uint8": lambda p: setattr(p, "has_initial_state", p.has_initial_state.byte()),
    "cu_seqlens is torch.int64": lambda p: setattr(p, "cu_seqlens", p.cu_seqlens.long()),
    "out is torch.float64": lambda p: setattr(p, "out", p.out.double()),
    "out is torch.float32 \\[3,": lambda p: setattr(p, "out", p.out[:3]),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_calls_are_refused_before_anything_is_written(sentence, backend, make_problem):
    problem = make_problem([2, 2], dim=16)
    BROKEN[sentence](problem)
    with pytest.raises(ValueError, match=sentence):
        problem.prefill(backend)
    assert problem.out.isnan().all() and problem.state.recurrent.isnan().all()
