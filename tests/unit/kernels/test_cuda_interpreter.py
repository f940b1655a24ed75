"""The Triton kernels on the CPU, in a process with Triton's interpreter, which `tests/e2e/kernels` starts.

The interpreter rounds bfloat16 stores towards zero, hence the wider tolerance than on a GPU.
"""

import importlib
import os
import sys

import pytest
import torch

from tests.unit.kernels.hostile import HOSTILE

pytest.importorskip("triton")

# The interpreter takes ten seconds a case: the same code in another dtype or size is for the soak, and for GPUs.
IN_BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.soak)


def long(value):
    return pytest.param(value, marks=pytest.mark.soak)


INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INSIDE, reason="runs where TRITON_INTERPRET is 1, see tests/e2e/kernels")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
STATE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


@pytest.fixture
def cuda():
    return importlib.import_module("kda_kernels.cuda")


def check(problem, cuda, solve, relative_error, call="prefill"):
    want_out, want_conv, want_recurrent = solve(problem)
    before = problem.clone()
    getattr(problem, call)(cuda)
    dtype = problem.out.dtype
    live = [state_index for state_index in problem.state_indices.tolist() if state_index > 0]
    assert relative_error(problem.out, want_out) < TOLERANCE[dtype]
    assert torch.equal(problem.state.conv[live].double(), want_conv[live])
    state_tolerance = 1e-5 if call == "decode" else STATE_TOLERANCE[dtype]
    if problem.state.recurrent.dtype == torch.bfloat16:
        state_tolerance = 5e-3
    assert relative_error(problem.state.recurrent[live], want_recurrent[live]) < state_tolerance
    others = [state_index for state_index in range(problem.state.conv.shape[0]) if state_index not in live]
    for name in ("conv", "recurrent"):
        now, then = getattr(problem.state, name)[others], getattr(before.state, name)[others]
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    bounds = problem.cu_seqlens.tolist()
    for n, state_index in enumerate(problem.state_indices.tolist()):
        if state_index <= 0:
            assert (problem.out[bounds[n] : bounds[n + 1]] == 0).all()
    store = problem.out.as_strided((problem.out.shape[0], problem.out.stride(0)), problem.out.stride())
    assert store[:, problem.out.shape[1] :].isnan().all()  # nothing is written between the tokens


@inside
@pytest.mark.parametrize("dtype", [torch.float32, IN_BFLOAT16])
@pytest.mark.parametrize(
    "lengths", [[0, 1, 15, 16], long([63, 0, 2]), long([64, 3]), [65, 1], long([127]), long([128]), [129]]
)
def test_prefill_of_every_length(lengths, dtype, cuda, make_problem, solve, relative_error):
    has_initial_state = [n % 2 == 0 for n in range(len(lengths))]
    problem = make_problem(lengths, dtype=dtype, has_initial_state=has_initial_state, strided=True)
    check(problem, cuda, solve, relative_error)


@inside
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, IN_BFLOAT16])
@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_hostile(call, dtype, hostile, cuda, make_problem, solve, relative_error):
    lengths = [1] * 3 if call == "decode" else [70]
    problem = make_problem(lengths, heads=1, dtype=dtype, has_initial_state=True)
    HOSTILE[hostile](problem)
    check(problem, cuda, solve, relative_error, call)


@inside
@pytest.mark.parametrize("call", ["prefill", "decode"])
@pytest.mark.parametrize("dim, heads", [(64, 2), (128, 1)])
@pytest.mark.parametrize("conv_kernel_size", [2, long(4), 5])
def test_sizes_and_taps(call, dim, heads, conv_kernel_size, cuda, make_problem, solve, relative_error):
    lengths = [1, 1] if call == "decode" else [18, 2]
    problem = make_problem(
        lengths,
        dim=dim,
        heads=heads,
        conv_kernel_size=conv_kernel_size,
        has_initial_state=True,
        param_dtype=torch.bfloat16,
    )
    check(problem, cuda, solve, relative_error, call)


@inside
@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_null_slots_and_slots_out_of_order(call, cuda, make_problem, solve, relative_error):
    lengths = [1] * 5 if call == "decode" else [3, 66, 1, 2, 17]
    problem = make_problem(lengths, heads=1, state_indices=[0, 5, -1, 0, 2], has_initial_state=True, strided=True)
    check(problem, cuda, solve, relative_error, call)


@inside
@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_bf16_state(call, cuda, make_problem, solve, relative_error):
    problem = make_problem([1, 1] if call == "decode" else [20, 1], has_initial_state=True)
    state = type(problem.state)(problem.state.conv, problem.state.recurrent.bfloat16())
    problem.state = state
    check(problem, cuda, solve, relative_error, call)


@inside
@pytest.mark.parametrize("options", [{"BV": 16, "INNER": 64}, {"BV": 32, "INNER": 32}, {"BV": 128, "INNER": 128}])
def test_decode_in_tiles(options, cuda, make_problem, solve, relative_error, monkeypatch):
    module = sys.modules["kda_kernels.cuda.decode"]  # the package's `decode` is the function
    monkeypatch.setattr(module, "_launch", lambda *_: {"PDL": False, "num_warps": 4} | options)
    check(make_problem([1] * 3, dim=128, has_initial_state=True), cuda, solve, relative_error, "decode")


@inside
def test_many_sequences_of_one_token(cuda, make_problem, solve, relative_error):
    check(make_problem([1] * 5, heads=1, has_initial_state=[n % 3 > 0 for n in range(5)]), cuda, solve, relative_error)


@inside
def test_long_calls_are_cut_into_parts(cuda, make_problem, solve, relative_error, monkeypatch):
    monkeypatch.setattr(sys.modules["kda_kernels.cuda.prefill"], "PART", 64)
    problem = make_problem(
        [2, 130, 0, 60, 3], heads=1, has_initial_state=[True, True, False, False, True], strided=True
    )
    check(problem, cuda, solve, relative_error)


@inside
def test_nothing_to_do(cuda, make_problem):
    problem = make_problem([])
    problem.prefill(cuda).decode(cuda)
    assert problem.state.conv.isnan().all()


@inside
def test_nan_stays_in_its_sequence(cuda, make_problem):
    problem = make_problem([5, 20, 3], heads=1)
    problem.inputs.qkv[7] = torch.nan
    problem.prefill(cuda)
    assert problem.out[8].isnan().any()
    assert problem.out[:5].isfinite().all() and problem.out[25:].isfinite().all()


def test_what_is_supported():
    from kda_kernels import cuda

    assert cuda.supports(torch.bfloat16, 128, torch.float32)[0]
    for refused in ((torch.float16, 128, torch.float32), (torch.bfloat16, 96, torch.float32)):
        ok, reason = cuda.supports(*refused)
        assert not ok and "Triton" in reason


@inside
@pytest.mark.parametrize("dtype", [torch.float32, IN_BFLOAT16])
def test_long_sequences_are_cut_into_segments(dtype, cuda, make_problem, solve, relative_error, monkeypatch):
    monkeypatch.setattr(sys.modules["kda_kernels.cuda.prefill"], "_segment_length", lambda *_: 1)
    has_initial_state = [True, False, True, True, True]
    problem = make_problem([2, 0, 200, 70, 20], heads=1, dtype=dtype, has_initial_state=has_initial_state, strided=True)
    problem.state_indices[3] = 0
    check(problem, cuda, solve, relative_error)
