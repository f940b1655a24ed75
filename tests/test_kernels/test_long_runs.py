"""The Triton kernels over a million rows and ten thousand steps, against fp64: errors do not add up."""

import copy
from dataclasses import fields, replace

import pytest
import torch

from kda_kernels import reference
from kda_kernels.types import KdaInputs, KdaState
from tests.test_kernels.test_cuda_gpu import on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS, CALLS, STEPS = 1 << 20, 128, 10_000


@pytest.fixture
def cuda():
    pytest.importorskip("triton")
    from kda_kernels import cuda

    return cuda


def wide(inputs: KdaInputs) -> KdaInputs:
    return KdaInputs(*(getattr(inputs, field.name).double() for field in fields(inputs)))


def on_gpu(problem):
    return replace(problem, **{field.name: on("cuda", getattr(problem, field.name)) for field in fields(problem)})


def test_a_million_rows(cuda, make_problem, relative_error, record_property):
    """In one call and in 128, one head of bf16."""
    whole = on_gpu(make_problem([ROWS], heads=1, dim=128, dtype=torch.bfloat16))
    state = KdaState(whole.state.conv.clone(), whole.state.recurrent.clone())
    parts = replace(whole, state=state, out=torch.full_like(whole.out, torch.nan))
    size = ROWS // CALLS
    for start in range(0, ROWS, size):
        part = parts.part(start, start + size, 0, start > 0)
        replace(part, cu_seqlens=part.cu_seqlens.cuda(), resume=part.resume.cuda()).prefill(cuda)
    whole.prefill(cuda)
    exact = replace(
        whole,
        inputs=wide(whole.inputs),
        state=KdaState(whole.state.conv.double(), whole.state.recurrent.double()),
        out=torch.empty_like(whole.out, dtype=torch.float64),
    ).prefill(reference)
    (slot,) = whole.slots.tolist()
    for name, got in (("one call", whole), ("128 calls", parts)):
        errors = [relative_error(got.out, exact.out)]
        errors.append(relative_error(got.state.recurrent[slot], exact.state.recurrent[slot]))
        record_property(name, errors)
        print(f"{name}: out {errors[0]:.2e}, state {errors[1]:.2e}")
        assert max(errors) < 2e-3
        assert torch.equal(got.state.conv[slot].double(), exact.state.conv[slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_steps(dtype, cuda, make_problem, relative_error, record_property):
    """Two sequences of four heads decoded to the end drift no more than the fp32 reference does."""
    ours = on_gpu(make_problem([1, 1], heads=4, dim=128, dtype=dtype, resume=True))
    rows = on("cuda", make_problem([2 * STEPS], heads=4, dim=128, dtype=dtype, seed=1).inputs)
    plain = copy.deepcopy(ours)
    exact = copy.deepcopy(ours)
    exact.state = KdaState(exact.state.conv.double(), exact.state.recurrent.double())
    exact.out = exact.out.double()
    for step in range(0, 2 * STEPS, 2):
        now = KdaInputs(*(getattr(rows, field.name)[step : step + 2] for field in fields(rows)))
        replace(ours, inputs=now).decode(cuda)
        replace(plain, inputs=now).decode(reference)
        replace(exact, inputs=wide(now)).decode(reference)
    live = ours.slots.long()
    drift, allowed = (relative_error(got.state.recurrent[live], exact.state.recurrent[live]) for got in (ours, plain))
    record_property("drift", [drift, allowed])
    print(f"{dtype}: state drifts {drift:.2e}, the fp32 reference's {allowed:.2e}")
    assert drift <= 1.1 * allowed + 1e-7
