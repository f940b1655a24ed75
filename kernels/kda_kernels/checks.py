"""Checks of the interface's records: dtypes, shapes and devices when they are made, contents where a host can read.

Each raises ValueError with a sentence that names the field, the value and what it must be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kda_kernels.interface import (
        DecodeArgs,
        KdaInputs,
        KdaParams,
        KdaState,
        PrefillArgs,
        PrefillCheckpoints,
        SpecDecodeArgs,
    )


def check_params(params: KdaParams) -> None:
    for name, dims in (("conv_weight", 2), ("A_log", 1), ("dt_bias", 1), ("norm_weight", 1)):
        tensor = getattr(params, name)
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it needs {dims} dimension(s).")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; give it a floating dtype.")
        if tensor.device != params.A_log.device:
            raise ValueError(f"{name} is on {tensor.device}, A_log on {params.A_log.device}; they must agree.")
    width = params.heads * params.head_dim
    if tuple(params.dt_bias.shape) != (width,):
        raise ValueError(
            f"dt_bias has {params.dt_bias.shape[0]} entries; A_log and norm_weight say {params.heads} heads "
            f"of {params.head_dim}, that is {width}."
        )
    if params.conv_weight.shape[0] != 3 * width or params.conv_kernel_size < 2:
        raise ValueError(
            f"conv_weight has shape {list(params.conv_weight.shape)}; it must be [{3 * width}, 2 or more]."
        )


def check_inputs(inputs: KdaInputs) -> None:
    # Each attribute of a tensor is read once: this runs for every layer of a step.
    qkv, g, beta, output_gate = inputs.qkv, inputs.g, inputs.beta, inputs.output_gate
    shapes: list[torch.Size] = []
    dtype, device = qkv.dtype, qkv.device
    for name, tensor in (("qkv", qkv), ("g", g), ("beta", beta), ("output_gate", output_gate)):
        shapes.append(shape := tensor.shape)
        if len(shape) != 2:
            raise ValueError(f"{name} has shape {list(shape)}; it must be [tokens, channels].")
        if tensor.stride(1) != 1 and shape[1] != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous.")
        if shape[0] != shapes[0][0]:
            raise ValueError(f"{name} has {shape[0]} tokens, qkv {shapes[0][0]}; they must agree.")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, qkv {dtype} on {device}; they must agree.")
    channels = [shape[1] for shape in shapes]
    if channels[0] != 3 * channels[1] or channels[3] != channels[1]:
        raise ValueError(
            f"qkv, g and output_gate have {channels[0]}, {channels[1]} and {channels[3]} channels; they must be "
            "3P, P and P."
        )


def check_state(state: KdaState) -> None:
    conv, recurrent = state.conv, state.recurrent
    if conv.dim() != 3:
        raise ValueError(f"state.conv has shape {list(conv.shape)}; it must be [states, conv_kernel_size-1, 3P].")
    if recurrent.dim() != 4:
        raise ValueError(f"state.recurrent has shape {list(recurrent.shape)}; it must be [states, H, V, K].")
    if conv.shape[0] != recurrent.shape[0]:
        raise ValueError(
            f"state.conv has {conv.shape[0]} states, state.recurrent {recurrent.shape[0]}; they must agree."
        )
    if conv.device != recurrent.device:
        raise ValueError(f"state.conv is on {conv.device}, state.recurrent on {recurrent.device}; they must agree.")
    if conv.stride(2) != 1:
        raise ValueError(f"state.conv has strides {conv.stride()}; its last must be 1.")
    _, _, values, keys = recurrent.shape
    if recurrent.stride()[1:] != (values * keys, keys, 1):
        raise ValueError(f"state.recurrent has strides {recurrent.stride()}; each state must be contiguous.")


def check_checkpoints(checkpoints: PrefillCheckpoints) -> None:
    offsets, indices = checkpoints.checkpoint_offsets, checkpoints.state_indices
    for name, tensor in (("checkpoint_offsets", offsets), ("state_indices", indices)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"checkpoints.{name} is {tensor.dtype} {list(tensor.shape)}; it must be contiguous int32 of one "
                "dimension."
            )
    if offsets.shape != indices.shape or offsets.device != indices.device:
        raise ValueError(
            f"checkpoints.checkpoint_offsets is {list(offsets.shape)} on {offsets.device}, checkpoints.state_indices "
            f"{list(indices.shape)} on {indices.device}; they must agree."
        )


def check_decode(args: DecodeArgs) -> None:
    _check_together(args)
    _check_table("state_indices", args.state_indices, torch.int32, args.inputs.qkv.shape[0])


def check_prefill(args: PrefillArgs) -> None:
    sequences = _check_cu_seqlens(args.cu_seqlens)
    _check_table("has_initial_state", args.has_initial_state, torch.bool, sequences)
    _check_devices(
        cu_seqlens=args.cu_seqlens, state_indices=args.state_indices, has_initial_state=args.has_initial_state
    )
    if args.checkpoints is not None:
        _check_devices(state_indices=args.state_indices, checkpoints=args.checkpoints.state_indices)
    _check_together(args)
    _check_table("state_indices", args.state_indices, torch.int32, sequences)


def check_spec_decode(args: SpecDecodeArgs) -> None:
    sequences = _check_cu_seqlens(args.cu_seqlens)
    indices = args.state_indices
    tokens = indices.shape[1] if indices.dim() == 2 else 0
    if (
        indices.dtype != torch.int32
        or tuple(indices.shape) != (sequences, tokens)
        or tokens < 1
        or not indices.is_contiguous()
    ):
        raise ValueError(
            f"state_indices is {indices.dtype} {list(indices.shape)}; it must be contiguous int32 with a row of 1 or "
            f"more entries for each of {sequences} sequences."
        )
    _check_table("num_accepted_tokens", args.num_accepted_tokens, torch.int32, sequences)
    _check_devices(cu_seqlens=args.cu_seqlens, state_indices=indices, num_accepted_tokens=args.num_accepted_tokens)
    _check_together(args)


def check_decode_values(args: DecodeArgs) -> None:
    """Check the contents of the tables, which costs a copy to the host if they are on a GPU."""
    _use_indices("state_indices", args.state_indices.tolist(), args.state.conv.shape[0], set())


def check_prefill_values(args: PrefillArgs) -> None:
    """As `check_decode_values`."""
    bounds, tokens, states = args.cu_seqlens.tolist(), args.inputs.qkv.shape[0], args.state.conv.shape[0]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {tokens}, the tokens."
        )
    _check_rising(bounds)
    used: set[int] = set()
    _use_indices("state_indices", args.state_indices.tolist(), states, used)
    if args.checkpoints is None:
        return
    offsets, indices = args.checkpoints.checkpoint_offsets.tolist(), args.checkpoints.state_indices.tolist()
    _use_indices("checkpoints.state_indices", indices, states, used)
    for offset, index in zip(offsets, indices, strict=True):
        if index > 0 and not 0 < offset <= tokens:
            raise ValueError(
                f"checkpoints.checkpoint_offsets holds {offset}; it must lie between 1 and {tokens}, the tokens."
            )


def check_spec_decode_values(args: SpecDecodeArgs) -> None:
    """As `check_decode_values`."""
    bounds, tokens, states = args.cu_seqlens.tolist(), args.inputs.qkv.shape[0], args.state.conv.shape[0]
    if bounds[0] != 0 or bounds[-1] > tokens:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to at most {tokens}, the tokens."
        )
    _check_rising(bounds)
    used: set[int] = set()
    table, accepted = args.state_indices.tolist(), args.num_accepted_tokens.tolist()
    for (start, end), indices, count in zip(pairwise(bounds), table, accepted, strict=True):
        if start == end or indices[0] <= 0:
            continue
        if end - start > len(indices):
            raise ValueError(
                f"cu_seqlens gives a sequence {end - start} tokens; state_indices has {len(indices)} for each."
            )
        if not 0 < count <= len(indices):
            raise ValueError(
                f"num_accepted_tokens holds {count}; it must lie between 1 and {len(indices)}, the states of each."
            )
        here = indices[: end - start] if count <= end - start else [*indices[: end - start], indices[count - 1]]
        if min(here) <= 0:
            raise ValueError(
                f"state_indices holds {min(here)} beside {indices[0]}; a sequence needs a state for each token."
            )
        _use_indices("state_indices", here, states, used)


def _check_together(args: DecodeArgs | PrefillArgs | SpecDecodeArgs) -> None:
    """Check what the records cannot see alone: that they belong together."""
    # Each attribute of a tensor is read once: this runs for every layer of a step.
    inputs, params, state, out = args.inputs, args.params, args.state, args.out
    heads, dim, size = params.heads, params.head_dim, params.conv_kernel_size
    width, dtype, device = heads * dim, inputs.qkv.dtype, inputs.qkv.device
    if not device == params.A_log.device == state.conv.device == args.state_indices.device == out.device:
        raise ValueError(
            f"qkv is on {device}, the weights on {params.A_log.device}, the state on {state.conv.device}, "
            f"state_indices on {args.state_indices.device} and out on {out.device}; all must be on one device."
        )
    tokens, channels = inputs.g.shape
    if channels != width or inputs.beta.shape[1] != heads:
        raise ValueError(
            f"g has {channels} channels and beta {inputs.beta.shape[1]}; "
            f"the layer has {heads} heads of {dim}, so they must be {width} and {heads}."
        )
    states, *shape = state.recurrent.shape
    if shape != [heads, dim, dim]:
        raise ValueError(f"state.recurrent has shape {[states, *shape]}; it must be [states, {heads}, {dim}, {dim}].")
    states, *shape = state.conv.shape
    if shape != [size - 1, 3 * width]:
        raise ValueError(f"state.conv has shape {[states, *shape]}; it must be [states, {size - 1}, {3 * width}].")
    if state.conv.dtype != dtype:
        raise ValueError(f"state.conv is {state.conv.dtype}, qkv {dtype}; they must agree.")
    if out.shape != (tokens, width) or out.dtype != dtype or out.stride(1) != 1:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}; it must be "
            f"{dtype} [{tokens}, {width}] with a contiguous last dimension."
        )


def _check_table(name: str, table: Tensor, dtype: torch.dtype, sequences: int) -> None:
    if table.dtype != dtype or table.shape != (sequences,) or not table.is_contiguous():
        raise ValueError(
            f"{name} is {table.dtype} {list(table.shape)}; it must be contiguous {str(dtype).removeprefix('torch.')} "
            f"with one entry for each of {sequences} sequences."
        )


def _check_cu_seqlens(cu_seqlens: Tensor) -> int:
    """Check dtype and shape; returns the number of sequences."""
    sequences = cu_seqlens.numel() - 1
    ok = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous()
    if not ok or sequences < 0:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be contiguous int32 of one "
            "dimension, 0 first and the number of tokens last."
        )
    return sequences


def _check_devices(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} is on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{places}; they must agree.")


def _check_rising(bounds: list[int]) -> None:
    for start, end in pairwise(bounds):
        if start > end:
            raise ValueError(f"cu_seqlens falls from {start} to {end}; it must not fall.")


def _use_indices(name: str, indices: list[int], states: int, used: set[int]) -> None:
    """Add `indices` to `used`; none above 0 may be used twice."""
    for index in indices:
        if index >= states:
            raise ValueError(f"{name} holds {index}; the cache has states 0 to {states - 1}.")
        if index > 0 and index in used:
            raise ValueError(f"{name} holds {index} twice; each state needs its own index.")
        used.add(index)
