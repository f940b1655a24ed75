"""The entry points. Each call goes to the fastest backend that can serve it; `describe` says which and why.

A backend is a module with `decode`, `prefill` and `verify` of the signatures below, and
`supports(dtype, head_dim, state_dtype) -> (ok, reason)`; importing it may raise ImportError with the reason.
KDA_KERNELS_BACKEND=reference in the environment turns the fast backends off.
"""

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from kda_kernels import reference
from kda_kernels.types import Exports, KdaInputs, KdaParams, KdaState

BACKEND_VARIABLE = "KDA_KERNELS_BACKEND"
_FAST_BACKENDS = {"cpu": "kda_kernels.cpu", "cuda": "kda_kernels.cuda"}


def decode(inputs: KdaInputs, params: KdaParams, state: KdaState, slots: Tensor, out: Tensor) -> None:
    """One token for each of T sequences: docs/kda.md sections 2 to 5, state updated in place.

    slots: int32 [T], the state slot of each row; no slot above 0 may occur twice. A row whose slot is
           <= 0 gives zeros and touches no state.
    out:   [T, P] activation dtype, any row stride: norm(o) * sigmoid(gate), ready for the output projection.
    """
    _select(inputs, params, state).decode(inputs, params, state, slots, out)


def prefill(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    cu_seqlens: Tensor,
    slots: Tensor,
    resume: Tensor,
    out: Tensor,
    exports: Exports | None = None,
) -> None:
    """Runs of tokens of N sequences, one after another in the rows: docs/kda.md sections 2 to 5.

    cu_seqlens: int32 [N+1]; sequence n has rows cu_seqlens[n] to cu_seqlens[n+1]; first 0, last T.
    slots:      int32 [N], as in `decode`.
    resume:     bool [N]; True goes on from the slot's state, False starts from zeros without reading it.
    out:        [T, P], as in `decode`.
    exports:    states to store along the way.
    """
    _select(inputs, params, state).prefill(inputs, params, state, cu_seqlens, slots, resume, out, exports)


def verify(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    cu_seqlens: Tensor,
    slots: Tensor,
    accepted: Tensor,
    out: Tensor,
) -> None:
    """`decode` of up to K tokens a sequence, of which a later step may accept only the first few.

    cu_seqlens: int32 [N+1]; sequence n has rows cu_seqlens[n] to cu_seqlens[n+1], 0 to K of them; first 0. Rows at
                and beyond the last are padding: zeros.
    slots:      int32 [N, K]; the state after token i (from 0) of sequence n is stored in slots[n, i]. No slot above 0
                may occur twice. A sequence whose slots[n, 0] is <= 0 gives zeros and touches no state.
    accepted:   int32 [N], 1 to K; sequence n goes on from the state in slots[n, accepted[n]-1], left there by the
                step before. Neither it nor the slots are read for a sequence without tokens.
    out:        [T, P], as in `decode`: to each token what `decode`, one token a call, would give.
    """
    _select(inputs, params, state).verify(inputs, params, state, cu_seqlens, slots, accepted, out)


def describe(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[str, str]:
    """(name, reason): the backend that serves these, and why it, or why not a faster one."""
    _, name, reason = _choose(torch.device(device).type, dtype, head_dim, state_dtype)
    return name, reason


def _select(inputs: KdaInputs, params: KdaParams, state: KdaState) -> ModuleType:
    qkv = inputs.qkv
    return _choose(qkv.device.type, qkv.dtype, params.head_dim, state.recurrent.dtype)[0]


@functools.cache
def _choose(device: str, dtype: torch.dtype, head_dim: int, state_dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    asked = os.environ.get(BACKEND_VARIABLE, "auto")
    if asked not in ("auto", "reference"):
        raise ValueError(f"{BACKEND_VARIABLE} is {asked!r}; set it to 'auto' or 'reference'.")
    if asked == "reference":
        return reference, "reference", f"{BACKEND_VARIABLE}=reference asks for plain torch"
    if device not in _FAST_BACKENDS:
        return reference, "reference", f"there are no fast kernels for device {device!r}"
    try:
        backend = importlib.import_module(_FAST_BACKENDS[device])
    except ImportError as error:
        return reference, "reference", str(error)
    ok, reason = backend.supports(dtype, head_dim, state_dtype)
    return (backend, device, reason) if ok else (reference, "reference", reason)
