"""The Triton kernels over a million tokens and ten thousand steps, against fp64: errors do not add up."""

from dataclasses import fields, replace

import pytest
import torch

from kda_kernels import reference
from kda_kernels.interface import KdaInputs
from tests.unit.kernels.test_cuda_gpu import in_fp64, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS, CALLS, STEPS = 1 << 20, 128, 10_000


def test_a_million_rows(cuda, make_problem, relative_error, record_property):
    """In one call and in 128, one head of bf16."""
    whole = on_gpu(make_problem([ROWS], heads=1, dim=128, dtype=torch.bfloat16))
    parts = whole.clone()
    size = ROWS // CALLS
    for start in range(0, ROWS, size):
        part = parts.part(start, start + size, 0, start > 0)
        replace(part, cu_seqlens=part.cu_seqlens.cuda(), has_initial_state=part.has_initial_state.cuda()).prefill(cuda)
    exact = in_fp64(whole).prefill(reference)
    whole.prefill(cuda)
    (state_index,) = whole.state_indices.tolist()
    for name, got in (("one call", whole), ("128 calls", parts)):
        errors = [relative_error(got.out, exact.out)]
        errors.append(relative_error(got.state.recurrent[state_index], exact.state.recurrent[state_index]))
        record_property(name, errors)
        print(f"{name}: out {errors[0]:.2e}, state {errors[1]:.2e}")
        assert max(errors) < 2e-3
        assert torch.equal(got.state.conv[state_index].double(), exact.state.conv[state_index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_steps(dtype, cuda, make_problem, relative_error, record_property):
    """Two sequences of four heads decoded to the end drift no more than the fp32 reference does."""
    ours = on_gpu(make_problem([1, 1], heads=4, dim=128, dtype=dtype, has_initial_state=True))
    problem = on_gpu(make_problem([2 * STEPS], heads=4, dim=128, dtype=dtype, seed=1))
    plain, exact, wide = ours.clone(), in_fp64(ours), in_fp64(problem)
    for step in range(0, 2 * STEPS, 2):
        now, now_wide = (
            KdaInputs(*(getattr(of.inputs, field.name)[step : step + 2] for field in fields(KdaInputs)))
            for of in (problem, wide)
        )
        replace(ours, inputs=now).decode(cuda)
        replace(plain, inputs=now).decode(reference)
        replace(exact, inputs=now_wide).decode(reference)
    live = ours.state_indices.long()
    drift, allowed = (relative_error(got.state.recurrent[live], exact.state.recurrent[live]) for got in (ours, plain))
    record_property("drift", [drift, allowed])
    print(f"{dtype}: state drifts {drift:.2e}, the fp32 reference's {allowed:.2e}")
    assert drift <= 1.1 * allowed + 1e-7
