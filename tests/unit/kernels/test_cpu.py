"""What the C kernels promise beyond the contract: the same bits however the work is cut up."""

import importlib
import itertools

import pytest
import torch

cpu = pytest.importorskip("kda_kernels.cpu", exc_type=ImportError)

library = importlib.import_module("kda_kernels.cpu.library")

SIZES = [1, 16, 37, 2, 64, 5]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3], ids=["baseline", "AVX2", "AVX-512"], autouse=True)
def instructions(request, monkeypatch):
    if request.param > cpu._isa:
        pytest.skip("this machine has no such instructions")
    monkeypatch.setattr(cpu, "_isa", request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(one, other):
    for name, got, want in (
        ("out", one.out, other.out),
        ("conv", one.state.conv, other.state.conv),
        ("recurrent", one.state.recurrent, other.state.recurrent),
    ):
        same = torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert same, f"{name} differs in {int((got != want).sum())} of {got.numel()} places"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [48, 64, 128])
def test_chunks_and_decode_steps_give_the_same_bits(dim, dtype, make_problem):
    whole = make_problem([sum(SIZES)], dim=dim, dtype=dtype)
    pieces, steps = whole.clone(), whole.clone()
    whole.prefill(cpu)
    bounds = [0, *itertools.accumulate(SIZES)]
    for start, end in itertools.pairwise(bounds):
        pieces.part(start, end, 0, has_initial_state=start > 0).prefill(cpu)
    assert_same_bits(pieces, whole)
    steps.part(0, 1, 0, has_initial_state=False).prefill(cpu)
    for row in range(1, sum(SIZES)):
        steps.part(row, row + 1, 0, has_initial_state=True).decode(cpu)
    assert_same_bits(steps, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_in_the_batch_does_not_change_a_bit(dtype, make_problem):
    has_initial_state = [True, False, True, True, False, True]
    together = make_problem(SIZES, dtype=dtype, has_initial_state=has_initial_state, strided=True)
    alone = together.clone()
    together.prefill(cpu)
    start = sum(SIZES)
    for n in reversed(range(len(SIZES))):
        start -= SIZES[n]
        alone.part(start, start + SIZES[n], n, has_initial_state=has_initial_state[n]).prefill(cpu)
    assert_same_bits(alone, together)


@pytest.mark.parametrize("call", ["decode", "prefill"])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_number_of_threads_does_not_change_a_bit(heads, call, make_problem, threads):
    lengths = [1] * 6 if call == "decode" else SIZES
    problem = make_problem(lengths, heads=heads, has_initial_state=True)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(getattr(problem.clone(), call)(cpu))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("call", ["decode", "prefill"])
@pytest.mark.parametrize("dim", [16, 64, 128, 144])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_right(dtype, dim, call, make_problem, solve, relative_error):
    problem = make_problem([1, 1] if call == "decode" else [35, 2], dim=dim, dtype=dtype, has_initial_state=True)
    out, conv, recurrent = solve(problem)
    getattr(problem, call)(cpu)
    live = problem.state_indices.tolist()
    assert relative_error(problem.out, out) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert torch.equal(problem.state.conv[live].double(), conv[live])
    assert relative_error(problem.state.recurrent[live], recurrent[live]) < 1e-5


def test_channels_do_not_depend_on_their_place(make_problem):
    """Equal inputs in every channel give equal decays, convolutions and outputs in every lane."""
    problem = make_problem([20], dim=64, heads=2)
    for x in (problem.inputs.qkv, problem.inputs.g, problem.inputs.output_gate, problem.inputs.beta):
        x.copy_(x[:, :1].expand_as(x))
    params = problem.params
    for weights in (params.A_log, params.dt_bias, params.norm_weight):
        weights.fill_(0.5)
    params.conv_weight.copy_(params.conv_weight[:1].expand_as(params.conv_weight))
    problem.prefill(cpu)
    assert torch.equal(problem.out, problem.out[:, :1].expand_as(problem.out))
    recurrent = problem.state.recurrent[problem.state_indices.long()]
    assert torch.equal(recurrent, recurrent[..., :1, :1].expand_as(recurrent))


def test_rounding_to_bf16_is_that_of_torch(make_problem):
    problem = make_problem([64], dtype=torch.bfloat16)
    wide = make_problem([64], dtype=torch.float32)
    for name in ("qkv", "g", "beta", "output_gate"):
        getattr(wide.inputs, name).copy_(getattr(problem.inputs, name))
    problem.prefill(cpu)
    wide.prefill(cpu)
    assert torch.equal(problem.out, wide.out.bfloat16())


def test_what_it_cannot_serve_it_names():
    for args, sentence in {
        (torch.float16, 128, torch.float32): "float16",
        (torch.float32, 128, torch.bfloat16): "state in float32, not torch.bfloat16",
        (torch.float32, 72, torch.float32): "multiples of 16 up to 256, not 72",
        (torch.float32, 272, torch.float32): "not 272",
    }.items():
        ok, reason = cpu.supports(*args)
        assert not ok and sentence in reason
    assert cpu.supports(torch.bfloat16, 128, torch.float32)[0]


def test_library_that_cannot_be_used_gives_the_reason(monkeypatch, tmp_path):
    size = cpu._CALL.size
    with pytest.raises(ImportError, match="are of another version; install gcc"):
        library.load({"run": size + 8})
    with pytest.raises(ImportError, match="undefined symbol: kda_walk"):
        library.load({"walk": size})
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(ImportError, match="were not built; install gcc"):
        library.load({"run": size})
    (tmp_path / "_kda.so").write_text("no library")
    with pytest.raises(ImportError, match="_kda\\.so cannot be loaded"):
        library.load({"run": size})


def test_too_many_taps_are_refused(make_problem):
    with pytest.raises(ValueError, match="conv_weight has a kernel size of 9"):
        make_problem([3], conv_kernel_size=9).prefill(cpu)


def test_the_openmp_of_this_process_is_shared_wherever_it_lies(monkeypatch):
    path = "/home/me/My venv/lib/libgomp-947d5fa1.so.1.0.0"
    opened = []
    monkeypatch.setattr(library.Path, "read_text", lambda self: f"7f0-7f1 r-xp 00000000 fe:00 421  {path}\n")
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name, mode: opened.append(name))
    library._share_openmp()
    assert opened == [path]
