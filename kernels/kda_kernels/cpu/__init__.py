"""KDA on the CPU: one C function does a whole step of a layer, prefill, decode and spec_decode alike.

Each head runs through its sequence token by token with its state in registers (docs/kda.md section 4), so a
result depends on nothing but its own sequence: the same bits for any split into chunks, any batch and any
number of threads. Importing raises ImportError, with the remedy, where the library was not built.
"""

import struct

import torch
from torch import Tensor

from kda_kernels.checks import check_decode_values, check_prefill_values, check_spec_decode_values
from kda_kernels.cpu.library import load
from kda_kernels.interface import DecodeArgs, PrefillArgs, PrefillCheckpoints, SpecDecodeArgs

_ISA_NAMES = {1: "baseline instructions", 2: "AVX2", 3: "AVX-512"}
_CALL = struct.Struct("=38qd")  # struct kda_call of kda.h
_MAX_DIM, _MAX_KERNEL_SIZE = 256, 8  # as in kda.h
_NO_MEMORY = "the C kernels could not allocate a few bytes for each state."
_library = load({"run": _CALL.size})
_isa = _library.kda_best_isa()


def supports(dtype: torch.dtype, head_dim: int, state_dtype: torch.dtype) -> tuple[bool, str]:
    """Whether these kernels can serve, and the reason."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"the C kernels take float32 and bfloat16 inputs, not {dtype}"
    if state_dtype != torch.float32:
        return False, f"the C kernels keep the state in float32, not {state_dtype}"
    if head_dim % 16 or not 0 < head_dim <= _MAX_DIM:
        return (
            False,
            f"the C kernels take head sizes that are multiples of 16 up to {_MAX_DIM}, not {head_dim}",
        )
    return True, f"C kernels with {_ISA_NAMES[_isa]}"


def decode(args: DecodeArgs) -> None:
    """One token for each of T sequences."""
    if _run(args):
        check_decode_values(args)
        raise MemoryError(_NO_MEMORY)


def prefill(args: PrefillArgs) -> None:
    """Runs of tokens of N sequences."""
    if _run(args, cu_seqlens=args.cu_seqlens, has_initial_state=args.has_initial_state, checkpoints=args.checkpoints):
        check_prefill_values(args)
        raise MemoryError(_NO_MEMORY)


def spec_decode(args: SpecDecodeArgs) -> None:
    """Up to Q tokens of N sequences."""
    tables = {"cu_seqlens": args.cu_seqlens, "num_accepted_tokens": args.num_accepted_tokens}
    if args.state_indices.shape[0] and _run(args, **tables):
        check_spec_decode_values(args)
        raise MemoryError(_NO_MEMORY)
    args.out[int(args.cu_seqlens[-1]) :] = 0


def _run(
    args: DecodeArgs | PrefillArgs | SpecDecodeArgs,
    cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    checkpoints: PrefillCheckpoints | None = None,
) -> int:
    """0, or, if the tables are not sound, 1 with nothing done."""
    inputs, params, state, state_indices, out = args.inputs, args.params, args.state, args.state_indices, args.out
    qkv, g, beta, output_gate = inputs.qkv, inputs.g, inputs.beta, inputs.output_gate
    conv, recurrent, conv_weight = state.conv, state.recurrent, params.conv_weight
    norm_weight, A_log, dt_bias = params.norm_weight, params.A_log, params.dt_bias
    wide, narrow = torch.float32, torch.bfloat16
    if A_log.dtype != wide or dt_bias.dtype != wide:
        A_log, dt_bias = A_log.float(), dt_bias.float()
    if conv_weight.dtype not in (wide, narrow) or norm_weight.dtype not in (wide, narrow):
        conv_weight, norm_weight = conv_weight.float(), norm_weight.float()
    if params.conv_kernel_size > _MAX_KERNEL_SIZE:
        raise ValueError(
            f"conv_weight has a kernel size of {params.conv_kernel_size}; the C kernels take up to {_MAX_KERNEL_SIZE}."
        )
    offsets, targets = None, None
    if checkpoints is not None:
        offsets, targets = checkpoints.checkpoint_offsets, checkpoints.state_indices
    call = _CALL.pack(
        *(x.data_ptr() for x in (qkv, g, beta, output_gate, out)),
        *(x.stride(0) for x in (qkv, g, beta, output_gate, out)),
        *(x.data_ptr() for x in (conv_weight, norm_weight, A_log, dt_bias, conv, recurrent)),
        *(conv.stride(0), conv.stride(1), recurrent.stride(0)),
        *(
            0 if x is None else x.data_ptr()
            for x in (state_indices, cu_seqlens, has_initial_state, num_accepted_tokens, offsets, targets)
        ),
        *(0 if offsets is None else offsets.shape[0], 1 if num_accepted_tokens is None else state_indices.shape[1]),
        *(qkv.shape[0], state_indices.shape[0], conv.shape[0], params.heads, params.head_dim, params.conv_kernel_size),
        *(qkv.dtype == narrow, conv_weight.dtype == narrow, norm_weight.dtype == narrow),
        *(torch.get_num_threads(), _isa),
        params.norm_eps,
    )
    return int(_library.kda_run(call))
