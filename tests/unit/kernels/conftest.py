"""Problems for the KDA kernels and a reference that shares no code with them."""

import copy
import os
from dataclasses import dataclass, fields
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kda_kernels import reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState, PrefillArgs, PrefillCheckpoints

# What runs here: within Triton's interpreter (test_cuda_interpreter.py) the kernels for GPUs, else those for the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cuda"] if INTERPRETED else ["reference", "cpu"]

if INTERPRETED:
    from tests.support import interpreter

    interpreter.look_up_builtins_once()


@dataclass
class Problem:
    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    cu_seqlens: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    out: Tensor

    def clone(self) -> "Problem":
        return copy.deepcopy(self)  # keeps strides: tensors are copied with their storage

    def prefill(self, backend: ModuleType, *checkpoints: PrefillCheckpoints) -> "Problem":
        table = (self.cu_seqlens, self.state_indices, self.has_initial_state)
        backend.prefill(PrefillArgs(self.inputs, self.params, self.state, *table, self.out, *checkpoints))
        return self

    def decode(self, backend: ModuleType) -> "Problem":
        backend.decode(DecodeArgs(self.inputs, self.params, self.state, self.state_indices, self.out))
        return self

    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def part(self, start: int, end: int, sequence: int, has_initial_state: bool) -> "Problem":
        """Tokens start to end, all of one sequence, as a problem that shares this one's state and output."""
        tokens, picked = slice(start, end), slice(sequence, sequence + 1)
        return Problem(
            self.inputs[tokens],
            self.params,
            self.state,
            torch.tensor([0, end - start], dtype=torch.int32),
            self.state_indices[picked],
            torch.tensor([has_initial_state]),
            self.out[tokens],
        )


def make_problem(
    lengths: list[int],
    *,
    heads: int = 2,
    dim: int = 64,
    conv_kernel_size: int = 4,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype = torch.float32,
    state_indices: list[int] | None = None,
    has_initial_state: list[bool] | bool = False,
    strided: bool = False,
    spare: int = 3,
    seed: int = 0,
) -> Problem:
    """Random inputs at trained scale: decays from 'forgets at once' to 'hardly ever', states out of order.

    strided: inputs and states are views with gaps, filled with NaN. States that are not read hold NaN too.
    spare: states of the cache beside one a sequence.
    """
    make = torch.Generator().manual_seed(seed)
    tokens, width, count = sum(lengths), heads * dim, len(lengths)
    gap = 24 if strided else 0

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    def rows_of(channels: int) -> Tensor:
        store = torch.full((tokens, channels + gap), torch.nan, dtype=dtype)
        store[:, gap // 2 : gap // 2 + channels] = randn(tokens, channels).to(dtype)
        return store[:, gap // 2 : gap // 2 + channels]

    def paged(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        store = torch.full((count + spare, size + gap), torch.nan, dtype=dtype)
        return store[:, :size].unflatten(1, shape)

    inputs = KdaInputs(rows_of(3 * width), rows_of(width), rows_of(heads), rows_of(width))
    params = KdaParams(
        conv_weight=(randn(3 * width, conv_kernel_size) * 0.5).to(param_dtype),
        A_log=torch.linspace(1.0, 16.0, heads).log(),
        dt_bias=torch.linspace(-7.0, 1.0, width)[torch.randperm(width, generator=make)],
        norm_weight=(1 + 0.1 * randn(dim)).to(param_dtype),
        norm_eps=1e-5,
    )
    shapes = ((conv_kernel_size - 1, 3 * width), (heads, dim, dim))
    state = KdaState(paged(shapes[0], dtype), paged(shapes[1], torch.float32))
    if state_indices is None:
        state_indices = (torch.randperm(count + 2, generator=make)[:count] + 1).tolist()
    initial = [has_initial_state] * count if isinstance(has_initial_state, bool) else has_initial_state
    for state_index, is_set in zip(state_indices, initial, strict=True):
        if is_set and state_index > 0:
            state.conv[state_index] = randn(*shapes[0]).to(dtype)
            state.recurrent[state_index] = randn(*shapes[1])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = torch.full((tokens, width + gap), torch.nan, dtype=dtype)[:, :width]
    index_table = torch.tensor(state_indices, dtype=torch.int32)
    return Problem(inputs, params, state, bounds, index_table, torch.tensor(initial, dtype=torch.bool), out)


def solve(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """docs/kda.md sections 2 to 5 by scalar loops in fp64, K-first: (out, state.conv, state.recurrent)."""
    params, wide = problem.params, torch.float64
    heads, dim, conv_kernel_size = params.heads, params.head_dim, params.conv_kernel_size
    qkv, g, beta, output_gate = (getattr(problem.inputs, f.name).to(wide) for f in fields(KdaInputs))
    weight, A_log, dt_bias, norm = (
        x.to(wide) for x in (params.conv_weight, params.A_log, params.dt_bias, params.norm_weight)
    )
    out = torch.zeros(qkv.shape[0], heads * dim, dtype=wide)
    conv, recurrent = problem.state.conv.to(wide), problem.state.recurrent.to(wide)
    bounds = problem.cu_seqlens.tolist()
    for n, state_index in enumerate(problem.state_indices.tolist()):
        if state_index <= 0:
            continue
        initial = bool(problem.has_initial_state[n])
        past = list(conv[state_index]) if initial else [torch.zeros(qkv.shape[1], dtype=wide)] * (conv_kernel_size - 1)
        S = recurrent[state_index].mT.clone() if initial else torch.zeros(heads, dim, dim, dtype=wide)
        for t in range(bounds[n], bounds[n + 1]):
            past.append(qkv[t])
            y = sum(weight[:, i] * past[len(past) - conv_kernel_size + i] for i in range(conv_kernel_size))
            y = y / (1 + torch.exp(-y))
            for h in range(heads):
                q, k, v = (y[p * heads * dim + h * dim :][:dim] for p in range(3))
                q = q / (q.square().sum() + 1e-6).sqrt() / dim**0.5
                k = k / (k.square().sum() + 1e-6).sqrt()
                z = g[t, h * dim :][:dim] + dt_bias[h * dim :][:dim]
                alpha = torch.exp(-A_log[h].exp() * torch.logaddexp(z, torch.zeros_like(z)))
                decayed = alpha[:, None] * S[h]
                error = v - decayed.T @ k
                S[h] = decayed + torch.outer(k, error) / (1 + torch.exp(-beta[t, h]))
                o = S[h].T @ q
                o = o / (o.square().mean() + params.norm_eps).sqrt() * norm
                out[t, h * dim :][:dim] = o / (1 + torch.exp(-output_gate[t, h * dim :][:dim]))
        conv[state_index] = torch.stack(past[len(past) - conv_kernel_size + 1 :])
        recurrent[state_index] = S.mT
    return out, conv, recurrent


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the 2-norm, 0 if both are zero, infinity if `got` is not finite."""
    got, want = got.double(), want.double()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def load_backend(name: str) -> ModuleType:
    if name == "reference":
        return reference
    return pytest.importorskip(f"kda_kernels.{name}", exc_type=ImportError)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These problems are too small to share, and sharing costs most where cores are few and busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="make_problem")
def make_problem_fixture():
    return make_problem


@pytest.fixture(name="solve")
def solve_fixture():
    return solve


@pytest.fixture(name="relative_error")
def relative_error_fixture():
    return relative_error


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return load_backend(request.param)


@pytest.fixture
def cuda() -> ModuleType:
    pytest.importorskip("triton")
    from kda_kernels import cuda

    return cuda


@pytest.fixture(
    params=[
        pytest.param(
            ("cpu", torch.float32),
            marks=pytest.mark.skipif(not INTERPRETED, reason="see tests/e2e/kernels"),
            id="interpreter",
        ),
        pytest.param(
            ("cuda", torch.bfloat16),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
            id="gpu",
        ),
    ]
)
def where(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Device and dtype of a Triton kernel: the interpreter rounds bfloat16 towards zero, so it computes in fp32."""
    found: tuple[str, torch.dtype] = request.param
    return found
