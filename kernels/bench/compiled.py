"""Registers, spills and shared memory of every kernel, compiled for sm_90. Needs no GPU.

PYTHONPATH=kernels python -m bench.compiled --out docs/benchmarks/compiled.md
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kda_kernels.constants import CHUNK_SIZE

Flags = dict[str, Any]  # options of a launch, or constants of a kernel
MODULES = ("decode", "spec_decode", "prefill", "conv_gate", "chunk_intra", "chunk_delta_h", "chunk_o", "index")
COMMAND = "PYTHONPATH=kernels python -m bench.compiled --out docs/benchmarks/compiled.md"
# Dtypes of pointers by argument name; every argument not named here is an int32 or, if capital, a constant.
ACTIVATIONS = ["qkv", "g", "beta", "output_gate", "conv_state", "norm_weight", "out"]
TABLES = [
    "state_indices",
    "cu_seqlens",
    "chunk_seq_idx",
    "chunk_offsets",
    "segment_seq_idx",
    "segment_offsets",
    "num_accepted_tokens",
    "checkpoint_offsets",
    "checkpoint_state_indices",
]
FLOATS = [
    "conv_weight",
    "A_log",
    "dt_bias",
    "recurrent_state",
    "decay",
    "u_scale",
    "v_scales",
    "beta_out",
    "g_cumsum",
    "h_scale",
    "initial_states",
    "transitions",
]
OPERANDS = ["w", "u", "qg", "kg", "Aqk", "h", "q", "k", "v"]
POINTERS = {"*bf16": ACTIVATIONS, "*i32": TABLES, "*fp32": FLOATS, "*fp16": OPERANDS, "*i1": ["has_initial_state"]}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names} | {"norm_eps": "fp32"}
UNALIGNED = [
    "begin",
    "end",
    "length",
    "heads",
    "chunks",
    "num_sequences",
    "beta_stride",
    "num_tokens",
    "max_query_len",
    "num_checkpoints",
    "sequences",
    "least",
]


def compiled_variant(kernel: Any, types: dict[str, str], options: Flags, constants: Flags) -> Any:
    """Triton's record of a kernel compiled for sm_90."""
    options = dict(options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    options.pop("launch_pdl", None)
    constants = constants | options
    signature = {n: "constexpr" if n in constants else (TYPES | types).get(n, "i32") for n in kernel.arg_names}
    unaligned = {*UNALIGNED, *(param.name for param in kernel.params if param.do_not_specialize_on_alignment)}
    aligned = [n for n, kind in signature.items() if (kind[0] == "*" or kind == "i32") and n not in unaligned]
    hints = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=launch)


def report(kernel: Any, types: dict[str, str], options: Flags, constants: Flags) -> list[str]:
    """[registers, bytes of stack (spills), shared bytes, HGMMA instructions] of one compiled variant."""
    compiled = compiled_variant(kernel, types, options, constants)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used, usage
    return [*used.groups(), str(compiled.metadata.shared), str(code.count("HGMMA"))]


def variants(dim: int) -> Iterator[tuple[str, Any, dict[str, str], Flags, Flags]]:
    """(name, kernel, argument types, launch options, constants) of what runs for bf16 inputs and a convolution of 4."""
    decode, spec_decode, prefill, conv_gate, chunk_intra, chunk_delta_h, chunk_o, index = (
        importlib.import_module(f"kda_kernels.cuda.{name}") for name in MODULES
    )
    size, chunk = {"D": dim}, {"D": dim, "BT": CHUNK_SIZE}
    columns = {"BV": min(dim, prefill.BV)}
    for name, programs, narrow in (("few", 1, False), ("many", 10000, False), ("many, bf16 state", 10000, True)):
        options, more = (
            decode._launch(programs, dim, narrow, registers) | {"PDL": True}
            for registers in (128, spec_decode.REGISTERS)
        )
        types = {"recurrent_state": "*bf16"} if narrow else {}
        constants = size | {"W": 4, "VALUES_AT": decode.VALUES_AT}
        yield f"decode, {name}", decode.kda_decode_kernel, types, options, constants
        yield f"spec_decode, {name}", spec_decode.kda_spec_decode_kernel, types, more, constants
    yield "index", index.kda_chunk_index_kernel, {}, {}, {"BT": CHUNK_SIZE}
    constants = chunk | {"W": 4, "QKV_ALIGN": 16, "G_ALIGN": 16}
    yield "conv_gate", conv_gate.kda_conv_gate_kernel, {}, prefill.CONV_GATE, constants
    levels = {"LEVELS": CHUNK_SIZE.bit_length() - 1}
    yield "chunk_intra", chunk_intra.kda_chunk_intra_kernel, {"beta": "*fp32"}, prefill.CHUNK_INTRA, chunk | levels
    passes = {"chunk_delta_h": (0, 0, 0), "chunk_delta_h, checkpoints": (0, 0, 1)}
    passes |= {"segments": (1, 0, 0), "segments, checkpoints": (1, 0, 1), "segments, summary": (1, 1, 0)}
    for name, flags in passes.items():
        constants = chunk | columns | {"W": 4, "BW": 4}
        constants |= dict(zip(("SEGMENTS", "SUMMARY", "STORE_CHECKPOINTS"), map(bool, flags), strict=True))
        yield name, chunk_delta_h.kda_chunk_delta_h_kernel, {}, prefill.CHUNK_DELTA_H, constants
    yield "segments, combined", chunk_delta_h.kda_combine_segments_kernel, {}, prefill.COMBINE_SEGMENTS, size | columns
    yield "chunk_o", chunk_o.kda_chunk_o_kernel, {}, prefill.CHUNK_O, chunk | columns | {"SEGMENTS": False}


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, str], Flags, Flags]]]:
    """What is launched meanwhile, in place of running it: (kernel, argument types, launch options, constants)."""
    found = []
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    names |= {torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8"}

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **more: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | more
        types, constants = {}, {}
        for param in kernel.params:
            value = given.pop(param.name)
            if param.is_constexpr:
                constants[param.name] = value
            elif isinstance(value, torch.Tensor):
                types[param.name] = names[value.dtype]
            else:
                types[param.name] = "fp32" if isinstance(value, float) else "i32"
        found.append((kernel, types, given, constants))

    with patch.object(JITFunction, "run", run):
        yield found


def decode_steps(tokens: int, kind: str = "bf16") -> Iterator[tuple[str, Any, dict[str, str], Flags, Flags]]:
    """As `variants`, of the kernels of a decode step of the 48B on one rank, with weights of a kind."""
    from bench.decode_layer import Layer

    layer = Layer(tokens, 1, "meta", kind)
    for operation, (call, _, _) in layer.calls().items():
        with recorded() as found:
            call()
        for kernel, *more in found:
            weights = "" if kind == "bf16" else f", {kind} weights"
            yield f"{operation}: {kernel.__name__}, {tokens} tokens{weights}", kernel, *more


def rounded_by_lane(ptx: str) -> int:
    """Fused multiply-adds to what comes from another lane: both lanes of such a sum add the same two products, and each
    rounds the other's alone. Which of the two sums a program then keeps is not defined (`product` in `vectors.py`)."""
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    shuffled |= {to for to, source in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx) if source in shuffled}
    return sum(last in shuffled for last in re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64], help="head sizes")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    lines = [
        "# GPU kernels, compiled",
        "",
        f"    {COMMAND}",
        "",
        f"For sm_90 by Triton {triton.__version__}, without a GPU; bf16 inputs, fp32 state unless named, W = 4.",
        "Stack bytes a thread are spilled registers; HGMMA are the tensor cores' instructions.",
        "",
        "| kernel | head size | registers | stack | shared bytes | HGMMA |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [(dim, row) for dim in arguments.dims for row in variants(dim)]
    rows += [(128, row) for tokens in (1, 2, 8) for row in decode_steps(tokens)]
    quantised = [
        row for kind in ("fp8", "fp8-block", "int4") for tokens in (1, 8) for row in decode_steps(tokens, kind)
    ]
    rows += [(128, row) for row in quantised if row[0].startswith(("in_proj: l", "o_proj", "router: r", "experts"))]
    for dim, (name, *compiled) in rows:
        if arguments.only in name:
            lines.append(f"| {name} | {dim} | " + " | ".join(report(*compiled)) + " |")
            print(lines[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
