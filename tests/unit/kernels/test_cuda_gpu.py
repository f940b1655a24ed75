"""The Triton kernels on a GPU, against the reference in fp64: real shapes, segments, long runs."""

import copy
import sys
from dataclasses import fields

import pytest
import torch

from kda_kernels import reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaState, PrefillCheckpoints, SpecDecodeArgs
from tests.unit.kernels.hostile import HOSTILE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def on(device, value):
    """A copy on the device that keeps strides and the gaps between tokens."""
    if isinstance(value, torch.Tensor):
        store = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0).to(device)
        return store.as_strided(value.shape, value.stride(), value.storage_offset())
    if not hasattr(value, "__dataclass_fields__"):
        return value
    return type(value)(*(on(device, getattr(value, f.name)) for f in fields(value)))


def on_gpu(value):
    return on("cuda", value)


def in_fp64(problem):
    want = problem.clone()
    want.inputs = KdaInputs(*(getattr(problem.inputs, f.name).double() for f in fields(KdaInputs)))
    want.state = KdaState(problem.state.conv.double(), problem.state.recurrent.double())
    want.out = problem.out.double()
    return want


def check(problem, cuda, relative_error, call="prefill"):
    want = in_fp64(problem)
    getattr(want, call)(reference)
    got = on_gpu(problem)
    getattr(got, call)(cuda)
    tolerance = TOLERANCE[problem.out.dtype]
    live = [state_index for state_index in problem.state_indices.tolist() if state_index > 0]
    assert relative_error(got.out.cpu(), want.out) < tolerance
    assert torch.equal(got.state.conv.cpu()[live].double(), want.state.conv[live])
    assert relative_error(got.state.recurrent.cpu()[live], want.state.recurrent[live]) < tolerance
    others = [state_index for state_index in range(problem.state.conv.shape[0]) if state_index not in live]
    torch.testing.assert_close(
        got.state.recurrent.cpu()[others], problem.state.recurrent[others], rtol=0, atol=0, equal_nan=True
    )
    again = on_gpu(problem)
    getattr(again, call)(cuda)
    assert torch.equal(again.out, got.out) and torch.equal(again.state.conv[live], got.state.conv[live])
    assert torch.equal(again.state.recurrent[live], got.state.recurrent[live])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [[1], [0, 1, 15, 16, 17], [63, 64, 65], [127, 128, 129], [1] * 50, [300, 0, 2]], ids=str
)
def test_prefill(lengths, dtype, dim, cuda, make_problem, relative_error):
    has_initial_state = [n % 2 == 0 for n in range(len(lengths))]
    check(
        make_problem(lengths, dim=dim, dtype=dtype, has_initial_state=has_initial_state, strided=True),
        cuda,
        relative_error,
    )


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_hostile(call, dtype, hostile, cuda, make_problem, relative_error):
    problem = make_problem([1] * 3 if call == "decode" else [70, 9, 64], dim=128, dtype=dtype, has_initial_state=True)
    HOSTILE[hostile](problem)
    check(problem, cuda, relative_error, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_of_long_sequences(dtype, cuda, make_problem, relative_error):
    problem = make_problem([2500, 70, 0, 2100, 1], heads=1, dim=128, dtype=dtype, has_initial_state=True, strided=True)
    check(problem, cuda, relative_error)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("heads, dim", [(3, 128), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(dtype, heads, dim, tokens, cuda, make_problem, relative_error):
    state_indices = [0 if n % 7 == 3 else tokens - n for n in range(tokens)]
    problem = make_problem(
        [1] * tokens,
        heads=heads,
        dim=dim,
        dtype=dtype,
        state_indices=state_indices,
        has_initial_state=True,
        strided=True,
    )
    check(problem, cuda, relative_error, "decode")


def test_decode_in_a_graph(cuda, make_problem):
    """A replay gives what calls give, also for state indices changed after the capture."""
    problem = on_gpu(make_problem([1] * 4, dim=128, dtype=torch.bfloat16, has_initial_state=True))
    problem.decode(cuda)  # compiled before the capture
    eager = copy.deepcopy(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.decode(cuda)
    for state_indices in (
        problem.state_indices.clone(),
        problem.state_indices.flip(0),
        torch.zeros_like(problem.state_indices),
    ):
        for trial in (problem, eager):
            trial.state_indices.copy_(state_indices)
        graph.replay()
        eager.decode(cuda)
        assert torch.equal(problem.out, eager.out)
        assert torch.equal(problem.state.conv.nan_to_num(7), eager.state.conv.nan_to_num(7))
        assert torch.equal(problem.state.recurrent.nan_to_num(7), eager.state.recurrent.nan_to_num(7))


@pytest.mark.parametrize("part", [1 << 19, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_checkpoints(state_dtype, dtype, part, cuda, make_problem, relative_error, monkeypatch):
    """In one part and in several, whole sequences and segments of them: all states against the reference."""
    monkeypatch.setattr(sys.modules["kda_kernels.cuda.prefill"], "PART", part)
    options = {"heads": 1, "dim": 128, "dtype": dtype, "strided": True, "spare": 12}
    options |= {"has_initial_state": [True, False, True, True, True], "state_indices": [3, 1, 5, 2, 4]}
    problem = make_problem([2500, 70, 0, 2100, 2], **options)
    problem.state = KdaState(problem.state.conv, problem.state.recurrent.to(state_dtype))
    points = [64, 2500, 2496, 4672, 2564, 2570 + 64 * 30, 4670, 64, 64 * 20, 2570]
    checkpoints = PrefillCheckpoints(
        torch.tensor(points, dtype=torch.int32), torch.tensor([15, 6, 7, 14, 8, 9, 13, 10, 11, 0], dtype=torch.int32)
    )
    want, got = in_fp64(problem).prefill(reference, checkpoints), on_gpu(problem).prefill(cuda, on_gpu(checkpoints))
    tolerance = 5e-3 if state_dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert relative_error(got.out.cpu(), want.out) < tolerance
    for state_index in range(17):
        if state_index in (0, 12, 16):
            assert got.state.recurrent[state_index].isnan().all() and got.state.conv[state_index].isnan().all()
            continue
        assert torch.equal(got.state.conv[state_index].cpu().double(), want.state.conv[state_index]), state_index
        assert relative_error(got.state.recurrent[state_index].cpu(), want.state.recurrent[state_index]) < tolerance, (
            state_index
        )


def spec_problem(make_problem, sequences, steps, **options):
    """(problem, state_indices, num_accepted_tokens) on the GPU: `steps` tokens a sequence, states from wherever."""
    count = sequences * steps
    problem = make_problem(
        [1] * count, state_indices=range(1, count + 1), has_initial_state=True, strided=True, **options
    )
    problem.cu_seqlens = torch.arange(0, count + 1, steps, dtype=torch.int32)
    state_indices = torch.randperm(count, generator=torch.Generator().manual_seed(1)).add(1).view(sequences, steps)
    return (
        on_gpu(problem),
        state_indices.to(torch.int32).cuda(),
        (torch.arange(sequences) % steps + 1).to(torch.int32).cuda(),
    )


def spec_decode(backend, problem, state_indices, num_accepted_tokens):
    tables = (problem.cu_seqlens, state_indices, num_accepted_tokens)
    backend.spec_decode(SpecDecodeArgs(problem.inputs, problem.params, problem.state, *tables, problem.out))


@pytest.mark.parametrize("sequences, steps", [(2, 1), (3, 4), (80, 1), (80, 4), (3, 16)])
@pytest.mark.parametrize("heads, dim", [(3, 128), (4, 64)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spec_decode_gives_the_bits_of_decode(dtype, state_dtype, heads, dim, sequences, steps, cuda, make_problem):
    problem, state_indices, num_accepted_tokens = spec_problem(
        make_problem, sequences, steps, heads=heads, dim=dim, dtype=dtype
    )
    problem.state = KdaState(problem.state.conv, problem.state.recurrent.to(state_dtype))
    single = copy.deepcopy(problem)
    spec_decode(cuda, problem, state_indices, num_accepted_tokens)
    before = state_indices.gather(1, num_accepted_tokens[:, None].long() - 1)[:, 0].long()
    for step in range(steps):
        here = state_indices[:, step].contiguous()
        for state in (single.state.conv, single.state.recurrent):
            state[here.long()] = state[before]
        inputs = single.inputs[step::steps]
        cuda.decode(DecodeArgs(inputs, single.params, single.state, here, single.out[step::steps]))
        before = here.long()
    assert torch.equal(problem.out, single.out)
    assert torch.equal(problem.state.conv[state_indices.long()], single.state.conv[state_indices.long()])
    assert torch.equal(problem.state.recurrent[state_indices.long()], single.state.recurrent[state_indices.long()])


def test_spec_decode_in_a_graph(cuda, make_problem, relative_error):
    """A replay gives what calls give, also for tables changed after the capture; null tokens and padding are zeros."""
    problem, state_indices, num_accepted_tokens = spec_problem(make_problem, 6, 4, dim=128, dtype=torch.bfloat16)
    want = in_fp64(on("cpu", problem))
    spec_decode(cuda, problem, state_indices, num_accepted_tokens)
    spec_decode(reference, want, state_indices.cpu(), num_accepted_tokens.cpu())
    assert relative_error(problem.out.cpu(), want.out) < TOLERANCE[torch.bfloat16]
    eager = copy.deepcopy(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spec_decode(cuda, problem, state_indices, num_accepted_tokens)
    for bounds in ([0, 4, 8, 12, 16, 20, 24], [0, 1, 4, 4, 7, 8, 8], [0, 0, 0, 0, 0, 0, 0]):
        state_indices[2, 0] = 0
        for trial in (problem, eager):
            trial.cu_seqlens.copy_(torch.tensor(bounds, dtype=torch.int32))
            trial.out.fill_(torch.nan)
        num_accepted_tokens.copy_(num_accepted_tokens % 4 + 1)
        graph.replay()
        spec_decode(cuda, eager, state_indices, num_accepted_tokens)
        assert torch.equal(problem.out, eager.out)
        assert (problem.out[bounds[-1] :] == 0).all() and (problem.out[bounds[2] : bounds[3]] == 0).all()
        assert torch.equal(problem.state.conv.nan_to_num(7), eager.state.conv.nan_to_num(7))
        assert torch.equal(problem.state.recurrent.nan_to_num(7), eager.state.recurrent.nan_to_num(7))
