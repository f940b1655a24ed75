"""KDA on the CPU: one C function does a whole step of a layer, prefill, decode and verify alike.

Each head runs through its sequence token by token with its state in registers (docs/kda.md section 4), so a
result depends on nothing but its own sequence: the same bits for any split into chunks, any batch and any
number of threads. Importing raises ImportError, with the remedy, where the library was not built.
"""

import struct

import torch
from torch import Tensor

from kda_kernels.cpu.library import load
from kda_kernels.types import (
    Exports,
    KdaInputs,
    KdaParams,
    KdaState,
    check_call,
    check_sequences,
    check_step_values,
    check_steps,
    check_values,
)

_ISA_NAMES = {1: "baseline instructions", 2: "AVX2", 3: "AVX-512"}
_CALL = struct.Struct("=38qd")  # struct kda_call of kda.h
_MAX_DIM, _MAX_TAPS = 256, 8  # as in kda.h
_NO_MEMORY = "the C kernels could not allocate a few bytes for each state slot."
_library = load(_CALL.size)
_isa = _library.kda_best_isa()


def supports(dtype: torch.dtype, head_dim: int, state_dtype: torch.dtype) -> tuple[bool, str]:
    """Whether these kernels can serve, and the reason."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"the C kernels take float32 and bfloat16 rows, not {dtype}"
    if state_dtype != torch.float32:
        return False, f"the C kernels keep the state in float32, not {state_dtype}"
    if head_dim % 16 or not 0 < head_dim <= _MAX_DIM:
        return (
            False,
            f"the C kernels take head sizes that are multiples of 16 up to {_MAX_DIM}, not {head_dim}",
        )
    return True, f"C kernels with {_ISA_NAMES[_isa]}"


def decode(inputs: KdaInputs, params: KdaParams, state: KdaState, slots: Tensor, out: Tensor) -> None:
    """One token for each of T sequences; arguments as `kda_kernels.ops.decode`."""
    check_call(inputs, params, state, slots, out, inputs.qkv.shape[0])
    if _run(inputs, params, state, slots, out):
        count = inputs.qkv.shape[0]
        check_values(list(range(count + 1)), slots.tolist(), count, state.conv.shape[0])
        raise MemoryError(_NO_MEMORY)


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
    """Runs of tokens of N sequences; arguments as `kda_kernels.ops.prefill`."""
    check_call(inputs, params, state, slots, out, check_sequences(cu_seqlens, slots, resume, exports))
    if _run(inputs, params, state, slots, out, cu_seqlens=cu_seqlens, resume=resume, exports=exports):
        check_values(cu_seqlens.tolist(), slots.tolist(), inputs.qkv.shape[0], state.conv.shape[0], exports)
        raise MemoryError(_NO_MEMORY)


def verify(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    cu_seqlens: Tensor,
    slots: Tensor,
    accepted: Tensor,
    out: Tensor,
) -> None:
    """Up to K tokens of N sequences; arguments as `kda_kernels.ops.verify`."""
    sequences, steps = check_steps(cu_seqlens, slots, accepted)
    check_call(inputs, params, state, slots.view(-1), out, sequences * steps)
    if sequences and _run(inputs, params, state, slots, out, cu_seqlens=cu_seqlens, accepted=accepted):
        bounds, table = cu_seqlens.tolist(), slots.tolist()
        check_step_values(bounds, table, accepted.tolist(), inputs.qkv.shape[0], state.conv.shape[0])
        raise MemoryError(_NO_MEMORY)
    out[int(cu_seqlens[-1]) :] = 0


def _run(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    slots: Tensor,
    out: Tensor,
    cu_seqlens: Tensor | None = None,
    resume: Tensor | None = None,
    accepted: Tensor | None = None,
    exports: Exports | None = None,
) -> int:
    """0, or, if the tables are not sound, 1 with nothing done."""
    qkv, forget, beta, gate = inputs.qkv, inputs.forget, inputs.beta, inputs.gate
    conv, recurrent, conv_weight = state.conv, state.recurrent, params.conv_weight
    norm_weight, a_log, dt_bias = params.norm_weight, params.a_log, params.dt_bias
    wide, narrow = torch.float32, torch.bfloat16
    if a_log.dtype != wide or dt_bias.dtype != wide:
        a_log, dt_bias = a_log.float(), dt_bias.float()
    if conv_weight.dtype not in (wide, narrow) or norm_weight.dtype not in (wide, narrow):
        conv_weight, norm_weight = conv_weight.float(), norm_weight.float()
    if params.taps > _MAX_TAPS:
        raise ValueError(f"conv_weight has {params.taps} taps; the C kernels take up to {_MAX_TAPS}.")
    after, targets = (exports.after, exports.slots) if exports is not None else (None, None)
    call = _CALL.pack(
        *(x.data_ptr() for x in (qkv, forget, beta, gate, out)),
        *(x.stride(0) for x in (qkv, forget, beta, gate, out)),
        *(x.data_ptr() for x in (conv_weight, norm_weight, a_log, dt_bias, conv, recurrent)),
        *(conv.stride(0), conv.stride(1), recurrent.stride(0)),
        *(0 if x is None else x.data_ptr() for x in (slots, cu_seqlens, resume, accepted, after, targets)),
        *(0 if after is None else after.shape[0], 1 if accepted is None else slots.shape[1]),
        *(qkv.shape[0], slots.shape[0], conv.shape[0], params.heads, params.head_dim, params.taps),
        *(qkv.dtype == narrow, conv_weight.dtype == narrow, norm_weight.dtype == narrow),
        *(torch.get_num_threads(), _isa),
        params.norm_eps,
    )
    return int(_library.kda_run(call))
