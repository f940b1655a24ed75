"""The interface of the kernels: the records that the operations take, and the operations.

`decode`, `prefill` and `spec_decode` go to the fastest backend that can serve the call; `describe` says which and why.
A backend is a module with these three functions and `supports(dtype, head_dim, state_dtype) -> (ok, reason)`; importing
it may raise ImportError with the reason. KDA_KERNELS_BACKEND=reference in the environment turns the fast ones off.

Every record checks its dtypes, shapes and devices when it is made, so that a backend need not. Letters of shapes:
T tokens, N sequences, H heads of D channels, P = H * D, W the kernel size of the convolution, Q tokens of a sequence
in `spec_decode`, S states in the cache. kernels/README.md has the contract as a table, docs/kda.md the mathematics.
"""

import functools
import importlib
import os
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from kda_kernels import checks

BACKEND_VARIABLE = "KDA_KERNELS_BACKEND"
_REFERENCE = "kda_kernels.reference"
_FAST_BACKENDS = {"cpu": "kda_kernels.cpu", "cuda": "kda_kernels.cuda"}


@dataclass(frozen=True, eq=False)
class KdaParams:
    """Weights of one KDA layer on one tensor-parallel rank. Kernels read them at each call: they may change in place.

    conv_weight: [3P, W] activation dtype or fp32, contiguous; channels q | k | v, [:, W-1] is for the current token.
    A_log:       [H] fp32, contiguous; log of the decay rate of each head (docs/kda.md section 3).
    dt_bias:     [P] fp32, contiguous; added to g.
    norm_weight: [D] activation dtype or fp32, contiguous; shared by all heads (docs/kda.md section 5).
    norm_eps:    added to the mean square inside the output norm.
    """

    conv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    norm_eps: float

    def __post_init__(self) -> None:
        checks.check_params(self)

    @cached_property
    def heads(self) -> int:
        return self.A_log.shape[0]

    @cached_property
    def head_dim(self) -> int:
        return self.norm_weight.shape[0]

    @cached_property
    def conv_kernel_size(self) -> int:
        return self.conv_weight.shape[1]


@dataclass(frozen=True, eq=False)
class KdaInputs:
    """The T tokens of one call, all projections of the layer's input, all in the activation dtype.

    qkv:         [T, 3P], q | k | v before the convolution.
    g:           [T, P], the gate of the decay (f_b(f_a(x))) before dt_bias, softplus and A_log.
    beta:        [T, H], before the sigmoid.
    output_gate: [T, P], g_b(g_a(x)) before the sigmoid.

    Each may be a view with any stride between tokens; the last dimension must be contiguous.
    """

    qkv: Tensor
    g: Tensor
    beta: Tensor
    output_gate: Tensor

    def __post_init__(self) -> None:
        checks.check_inputs(self)

    def __getitem__(self, tokens: slice | Tensor) -> "KdaInputs":
        return KdaInputs(self.qkv[tokens], self.g[tokens], self.beta[tokens], self.output_gate[tokens])


@dataclass(frozen=True, eq=False)
class KdaState:
    """Views of the state cache, one state per sequence in dimension 0, whose stride is free (padded pages).

    conv:      [S, W-1, 3P] activation dtype; the last inputs of the convolution, oldest first.
    recurrent: [S, H, V, K] fp32, or what the backend supports; row v is what the head holds of value channel v.

    State 0 is the null state: an index of 0 or below is neither read nor written.
    """

    conv: Tensor
    recurrent: Tensor

    def __post_init__(self) -> None:
        checks.check_state(self)


@dataclass(frozen=True, eq=False)
class PrefillCheckpoints:
    """States to keep from within a prefill, as a prefix cache does: C of them, in any order.

    checkpoint_offsets: int32 [C]; the state, of convolution and recurrence, after so many of the call's tokens ...
    state_indices:      int32 [C]; ... is stored at this index as well, one that the call uses for nothing else; <= 0:
                        nowhere.

    An offset lies behind a token of a sequence: 64 tokens or a multiple from the sequence's start, or at its end (the
    backends `cpu` and `reference` take any). What lies in a null sequence is not stored.
    """

    checkpoint_offsets: Tensor
    state_indices: Tensor

    def __post_init__(self) -> None:
        checks.check_checkpoints(self)


@dataclass(frozen=True, eq=False, slots=True)
class DecodeArgs:
    """One token for each of T sequences.

    state_indices: int32 [T], the state of each token's sequence; none above 0 may occur twice. A token whose index is
                   <= 0 gives zeros and touches no state.
    out:           [T, P] activation dtype, any stride between tokens: norm(o) * sigmoid(output_gate), ready for the
                   output projection.
    """

    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    state_indices: Tensor
    out: Tensor

    def __post_init__(self) -> None:
        checks.check_decode(self)


@dataclass(frozen=True, eq=False, slots=True)
class PrefillArgs:
    """Runs of tokens of N sequences, one sequence after another.

    cu_seqlens:        int32 [N+1]; sequence n has tokens cu_seqlens[n] to cu_seqlens[n+1]; first 0, last T.
    state_indices:     int32 [N], as in `DecodeArgs`.
    has_initial_state: bool [N]; True starts from the state at the index, False from zeros without reading it.
    out:               [T, P], as in `DecodeArgs`.
    checkpoints:       states to store along the way, if any.
    """

    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    cu_seqlens: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    out: Tensor
    checkpoints: PrefillCheckpoints | None = None

    def __post_init__(self) -> None:
        checks.check_prefill(self)


@dataclass(frozen=True, eq=False, slots=True)
class SpecDecodeArgs:
    """Up to Q tokens for each of N sequences, of which a later step may accept only the first few.

    cu_seqlens:          int32 [N+1]; sequence n has tokens cu_seqlens[n] to cu_seqlens[n+1], 0 to Q of them; first 0.
                         Tokens at and beyond the last are padding: zeros.
    state_indices:       int32 [N, Q]; the state after token i (from 0) of sequence n is stored at state_indices[n, i].
                         None above 0 may occur twice. A sequence whose state_indices[n, 0] is <= 0 gives zeros and
                         touches no state.
    num_accepted_tokens: int32 [N], 1 to Q; sequence n starts from the state at state_indices[n,
                         num_accepted_tokens[n] - 1], left there by the step before. Neither it nor the indices are read
                         for a sequence without tokens.
    out:                 [T, P], as in `DecodeArgs`.
    """

    inputs: KdaInputs
    params: KdaParams
    state: KdaState
    cu_seqlens: Tensor
    state_indices: Tensor
    num_accepted_tokens: Tensor
    out: Tensor

    def __post_init__(self) -> None:
        checks.check_spec_decode(self)


def decode(args: DecodeArgs) -> None:
    """docs/kda.md sections 2 to 5 for one token of each sequence; the states are updated in place."""
    _select(args).decode(args)


def prefill(args: PrefillArgs) -> None:
    """docs/kda.md sections 2 to 5 for a run of tokens of each sequence; the states are updated in place."""
    _select(args).prefill(args)


def spec_decode(args: SpecDecodeArgs) -> None:
    """To each token what `decode`, one token a call, would give, and the state after each of them."""
    _select(args).spec_decode(args)


def describe(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[str, str]:
    """(name, reason): the backend that serves these, and why it, or why not a faster one."""
    _, name, reason = _choose(torch.device(device).type, dtype, head_dim, state_dtype)
    return name, reason


def _select(args: DecodeArgs | PrefillArgs | SpecDecodeArgs) -> ModuleType:
    qkv = args.inputs.qkv
    return _choose(qkv.device.type, qkv.dtype, args.params.head_dim, args.state.recurrent.dtype)[0]


@functools.cache
def _choose(device: str, dtype: torch.dtype, head_dim: int, state_dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    reference = importlib.import_module(_REFERENCE)
    asked = os.environ.get(BACKEND_VARIABLE, "auto")
    if asked not in ("auto", "reference"):
        raise ValueError(f"{BACKEND_VARIABLE} is {asked!r}; set it to 'auto' or 'reference'.")
    if asked == "reference":
        return reference, "reference", f"{BACKEND_VARIABLE}=reference is set"
    if device not in _FAST_BACKENDS:
        return reference, "reference", f"there are no fast kernels for device {device!r}"
    try:
        backend = importlib.import_module(_FAST_BACKENDS[device])
    except ImportError as error:
        return reference, "reference", str(error)
    ok, reason = backend.supports(dtype, head_dim, state_dtype)
    return (backend, device, reason) if ok else (reference, "reference", reason)
