"""What the KDA entry points take. Each record checks itself when it is made, so the kernels need not."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KdaParams:
    """Weights of one KDA layer on one tensor-parallel rank: H heads of dimension D (= K = V), P = H*D.

    conv_weight: [3P, taps], activation dtype or fp32; channels q | k | v, tap [taps-1] is the current token.
    a_log:       [H] fp32, log of the decay rate of each head (docs/kda.md section 3).
    dt_bias:     [P] fp32, added to the forget projection.
    norm_weight: [D], shared by all heads (docs/kda.md section 5).
    norm_eps:    added to the mean square inside the output norm.

    Kernels read the tensors anew at each call: weights may be changed in place.
    """

    conv_weight: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    norm_eps: float

    def __post_init__(self) -> None:
        for name, dims in (("conv_weight", 2), ("a_log", 1), ("dt_bias", 1), ("norm_weight", 1)):
            tensor = getattr(self, name)
            if tensor.dim() != dims:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it needs {dims} dimension(s).")
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous.")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has dtype {tensor.dtype}; give it a floating dtype.")
            if tensor.device != self.a_log.device:
                raise ValueError(f"{name} is on {tensor.device}, a_log on {self.a_log.device}; they must agree.")
        width = self.heads * self.head_dim
        if tuple(self.dt_bias.shape) != (width,):
            raise ValueError(
                f"dt_bias has {self.dt_bias.shape[0]} entries; a_log and norm_weight say {self.heads} heads "
                f"of {self.head_dim}, that is {width}."
            )
        if self.conv_weight.shape[0] != 3 * width or self.taps < 2:
            raise ValueError(
                f"conv_weight has shape {list(self.conv_weight.shape)}; it must be [{3 * width}, 2 or more]."
            )

    @cached_property
    def heads(self) -> int:
        return self.a_log.shape[0]

    @cached_property
    def head_dim(self) -> int:
        return self.norm_weight.shape[0]

    @cached_property
    def taps(self) -> int:
        return self.conv_weight.shape[1]


@dataclass(frozen=True, eq=False)
class KdaInputs:
    """The T token rows of one step, all projections of the layer's input, all in the activation dtype.

    qkv:    [T, 3P] before the convolution.
    forget: [T, P]  second half of the low-rank forget gate, before dt_bias.
    beta:   [T, H]  before the sigmoid.
    gate:   [T, P]  second half of the low-rank output gate, before the sigmoid.

    Each may be a view with any row stride; the last dimension must be contiguous.
    """

    qkv: Tensor
    forget: Tensor
    beta: Tensor
    gate: Tensor

    def __post_init__(self) -> None:
        qkv = self.qkv
        for name in ("qkv", "forget", "beta", "gate"):
            tensor = getattr(self, name)
            if tensor.dim() != 2:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [rows, channels].")
            if tensor.stride(1) != 1 and tensor.shape[1] != 1:
                raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous.")
            if tensor.shape[0] != qkv.shape[0]:
                raise ValueError(f"{name} has {tensor.shape[0]} rows, qkv {qkv.shape[0]}; they must agree.")
            if tensor.dtype != qkv.dtype or tensor.device != qkv.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, qkv {qkv.dtype} on {qkv.device}; they must agree."
                )
        if qkv.shape[1] != 3 * self.forget.shape[1] or self.gate.shape[1] != self.forget.shape[1]:
            raise ValueError(
                f"qkv, forget and gate have {qkv.shape[1]}, {self.forget.shape[1]} and {self.gate.shape[1]} "
                "channels; they must be 3P, P and P."
            )


@dataclass(frozen=True, eq=False)
class KdaState:
    """Views of the cache, one slot per sequence in dimension 0, whose stride is free (padded pages).

    conv:      [slots, taps-1, 3P] last inputs of the convolution, oldest first, activation dtype.
    recurrent: [slots, H, V, K] state matrices, V-first: row v is what the head holds of value channel v.

    Slot 0 (and any negative slot) is the null slot: it is neither read nor written.
    """

    conv: Tensor
    recurrent: Tensor

    def __post_init__(self) -> None:
        conv, recurrent = self.conv, self.recurrent
        if conv.dim() != 3:
            raise ValueError(f"state.conv has shape {list(conv.shape)}; it must be [slots, taps-1, 3P].")
        if recurrent.dim() != 4:
            raise ValueError(f"state.recurrent has shape {list(recurrent.shape)}; it must be [slots, H, V, K].")
        if conv.shape[0] != recurrent.shape[0]:
            raise ValueError(
                f"state.conv has {conv.shape[0]} slots, state.recurrent {recurrent.shape[0]}; they must agree."
            )
        if conv.device != recurrent.device:
            raise ValueError(f"state.conv is on {conv.device}, state.recurrent on {recurrent.device}; they must agree.")
        if conv.stride(2) != 1:
            raise ValueError(f"state.conv has strides {conv.stride()}; its last must be 1.")
        _, _, values, keys = recurrent.shape
        if recurrent.stride()[1:] != (values * keys, keys, 1):
            raise ValueError(f"state.recurrent has strides {recurrent.stride()}; a slot must be contiguous.")


@dataclass(frozen=True, eq=False)
class Exports:
    """States to keep from within a prefill, as a prefix cache does: E of them, in any order.

    after: int32 [E]; the state, of convolution and recurrence, after the first after[e] of the call's rows ...
    slots: int32 [E]; ... is stored in slots[e] as well, one that the call uses for nothing else; <= 0: nowhere.

    after[e] lies behind a row of a sequence: 64 rows or a multiple from the sequence's start, or at its end (the
    backends `cpu` and `reference` take any row). What lies in a null sequence is not stored.
    """

    after: Tensor
    slots: Tensor

    def __post_init__(self) -> None:
        after, slots = self.after, self.slots
        for name, tensor in (("after", after), ("slots", slots)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"exports.{name} is {tensor.dtype} {list(tensor.shape)}; it must be contiguous int32 of one "
                    "dimension."
                )
        if after.shape != slots.shape or after.device != slots.device:
            raise ValueError(
                f"exports.after is {list(after.shape)} on {after.device}, exports.slots {list(slots.shape)} on "
                f"{slots.device}; they must agree."
            )


def check_call(
    inputs: KdaInputs, params: KdaParams, state: KdaState, slots: Tensor, out: Tensor, sequences: int
) -> None:
    """Check what the records cannot see alone: that they belong together."""
    heads, dim, width = params.heads, params.head_dim, params.heads * params.head_dim
    rows, device = inputs.forget.shape[0], inputs.qkv.device
    if not device == params.a_log.device == state.conv.device == slots.device == out.device:
        raise ValueError(
            f"qkv is on {device}, the weights on {params.a_log.device}, the state on {state.conv.device}, "
            f"slots on {slots.device} and out on {out.device}; all must be on one device."
        )
    if inputs.forget.shape[1] != width or inputs.beta.shape[1] != heads:
        raise ValueError(
            f"forget has {inputs.forget.shape[1]} channels and beta {inputs.beta.shape[1]}; "
            f"the layer has {heads} heads of {dim}, so they must be {width} and {heads}."
        )
    if state.recurrent.shape[1:] != (heads, dim, dim):
        raise ValueError(
            f"state.recurrent has shape {list(state.recurrent.shape)}; it must be [slots, {heads}, {dim}, {dim}]."
        )
    if state.conv.shape[1:] != (params.taps - 1, 3 * width):
        raise ValueError(
            f"state.conv has shape {list(state.conv.shape)}; it must be [slots, {params.taps - 1}, {3 * width}]."
        )
    if state.conv.dtype != inputs.qkv.dtype:
        raise ValueError(f"state.conv is {state.conv.dtype}, qkv {inputs.qkv.dtype}; they must agree.")
    if out.shape != (rows, width) or out.dtype != inputs.qkv.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}; it must be "
            f"{inputs.qkv.dtype} [{rows}, {width}] with a contiguous last dimension."
        )
    if slots.dtype != torch.int32 or slots.shape != (sequences,) or not slots.is_contiguous():
        raise ValueError(
            f"slots is {slots.dtype} {list(slots.shape)}; it must be contiguous int32 with one entry for "
            f"each of {sequences} sequences."
        )


def check_sequences(cu_seqlens: Tensor, slots: Tensor, resume: Tensor, exports: Exports | None) -> int:
    """Check the dtypes and shapes of prefill's sequence table; returns the number of sequences N."""
    sequences = _check_bounds(cu_seqlens)
    if resume.dtype != torch.bool or resume.shape != (sequences,) or not resume.is_contiguous():
        raise ValueError(
            f"resume is {resume.dtype} {list(resume.shape)}; it must be contiguous bool with one entry for "
            f"each of {sequences} sequences."
        )
    _check_devices(cu_seqlens=cu_seqlens, slots=slots, resume=resume)
    if exports is not None:
        _check_devices(slots=slots, exports=exports.slots)
    return sequences


def check_steps(cu_seqlens: Tensor, slots: Tensor, accepted: Tensor) -> tuple[int, int]:
    """Check the dtypes and shapes of verify's sequence table; returns the number of sequences N and K."""
    sequences = _check_bounds(cu_seqlens)
    steps = slots.shape[1] if slots.dim() == 2 else 0
    if slots.dtype != torch.int32 or slots.shape != (sequences, steps) or steps < 1 or not slots.is_contiguous():
        raise ValueError(
            f"slots is {slots.dtype} {list(slots.shape)}; it must be contiguous int32 with a row of 1 or more "
            f"entries for each of {sequences} sequences."
        )
    if accepted.dtype != torch.int32 or accepted.shape != (sequences,) or not accepted.is_contiguous():
        raise ValueError(
            f"accepted is {accepted.dtype} {list(accepted.shape)}; it must be contiguous int32 with one entry for "
            f"each of {sequences} sequences."
        )
    _check_devices(cu_seqlens=cu_seqlens, slots=slots, accepted=accepted)
    return sequences, steps


def check_values(
    bounds: list[int], slots: list[int], rows: int, available: int, exports: Exports | None = None
) -> None:
    """Check the contents of a sequence table: `bounds` as cu_seqlens over `rows` rows, `available` slots."""
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {rows}, the rows.")
    _check_rising(bounds)
    seen: set[int] = set()
    _use_slots("slots", slots, available, seen)
    if exports is None:
        return
    _use_slots("exports.slots", exports.slots.tolist(), available, seen)
    for row, slot in zip(exports.after.tolist(), exports.slots.tolist(), strict=True):
        if slot > 0 and not 0 < row <= rows:
            raise ValueError(f"exports.after holds {row}; it must lie between 1 and {rows}, the rows.")


def check_step_values(
    bounds: list[int], slots: list[list[int]], accepted: list[int], rows: int, available: int
) -> None:
    """Check the contents of verify's sequence table; arguments as `check_values`."""
    if bounds[0] != 0 or bounds[-1] > rows:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to at most {rows}, the rows."
        )
    _check_rising(bounds)
    seen: set[int] = set()
    for (start, end), steps, count in zip(pairwise(bounds), slots, accepted, strict=True):
        if start == end or steps[0] <= 0:
            continue
        if end - start > len(steps):
            raise ValueError(f"cu_seqlens gives a sequence {end - start} tokens; slots has {len(steps)} for each.")
        if not 0 < count <= len(steps):
            raise ValueError(f"accepted holds {count}; it must lie between 1 and {len(steps)}, the slots each has.")
        used = steps[: end - start] if count <= end - start else [*steps[: end - start], steps[count - 1]]
        if min(used) <= 0:
            raise ValueError(f"slots holds {min(used)} beside {steps[0]}; a sequence needs a slot for each token.")
        _use_slots("slots", used, available, seen)


def _check_bounds(cu_seqlens: Tensor) -> int:
    sequences = cu_seqlens.numel() - 1
    ok = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous()
    if not ok or sequences < 0:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be contiguous int32 of one "
            "dimension, 0 first and the number of rows last."
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


def _use_slots(name: str, slots: list[int], available: int, seen: set[int]) -> None:
    """Add to `seen` what `slots` uses; none may be used twice."""
    for slot in slots:
        if slot >= available:
            raise ValueError(f"{name} holds {slot}; the state has slots 0 to {available - 1}.")
        if slot > 0 and slot in seen:
            raise ValueError(f"{name} holds {slot} twice; each state needs its own slot.")
        seen.add(slot)
