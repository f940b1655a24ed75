"""Registers, spills and shared memory of every kernel, compiled for sm_90. Needs no GPU.

PYTHONPATH=kernels python kernels/bench/compiled.py --out docs/benchmarks/compiled.md
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COMMAND = "PYTHONPATH=kernels python kernels/bench/compiled.py --out docs/benchmarks/compiled.md"
# Dtypes of pointers by argument name; every argument not named here is an int32 or, if capital, a constant.
ROWS = {name: "*bf16" for name in ("qkv", "forget", "beta", "gate", "conv", "norm_weight", "out")}
TABLES = ("slots", "cu_seqlens", "chunk_sequence", "first_chunk", "segment_sequence", "first_segment")
TABLES += ("accepted", "export_after", "export_slots")
FLOATS = ("conv_weight", "a_log", "dt_bias", "recurrent", "decay", "scale", "strengths", "v_scales", "units", "starts")
OPERANDS = ("w", "u", "qd", "kd", "p", "snapshots", "q", "k", "v")
TYPES = ROWS | {name: "*i32" for name in TABLES} | {name: "*fp32" for name in (*FLOATS, "sums", "transitions")}
TYPES |= {name: "*fp16" for name in OPERANDS} | {"resume": "*i1", "norm_eps": "fp32"}
UNALIGNED = ("begin", "end", "length", "heads", "chunks", "sequences", "beta_stride", "rows", "steps", "exports")


def report(kernel, types: dict[str, str], options: dict[str, int | bool], constants: dict[str, int | bool]):
    """[registers, bytes of stack (spills), shared bytes, HGMMA instructions] of one compiled variant."""
    options = dict(options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    options.pop("launch_pdl", None)
    constants = constants | options
    signature = {n: "constexpr" if n in constants else (TYPES | types).get(n, "i32") for n in kernel.arg_names}
    unaligned = {*UNALIGNED, *(param.name for param in kernel.params if param.do_not_specialize_on_alignment)}
    aligned = [n for n, kind in signature.items() if (kind[0] == "*" or kind == "i32") and n not in unaligned]
    hints = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=launch)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return [registers, stack, str(compiled.metadata.shared), str(code.count("HGMMA"))]


def variants(dim: int):
    """(name, kernel, argument types, launch options, constants) of what runs for bf16 rows and 4 taps."""
    decode, spec_decode, prefill, prepare, intra, states, output = (
        importlib.import_module(f"kda_kernels.cuda.{name}")
        for name in ("decode", "spec_decode", "prefill", "prepare", "intra", "states", "output")
    )
    size, chunk = {"D": dim}, {"D": dim, "C": prefill.CHUNK}
    columns = {"BV": min(dim, prefill.COLUMNS)}
    for name, programs, narrow in (("few", 1, False), ("many", 10000, False), ("many, bf16 state", 10000, True)):
        options, more = (
            decode._launch(programs, dim, narrow, registers) | {"PDL": True}
            for registers in (128, spec_decode.REGISTERS)
        )
        types = {"recurrent": "*bf16"} if narrow else {}
        constants = size | {"TAPS": 4, "VALUES_AT": decode.VALUES_AT}
        yield f"decode, {name}", decode._decode, types, options, constants
        yield f"spec_decode, {name}", spec_decode._spec_decode, types, more, constants
    constants = chunk | {"TAPS": 4, "QKV_ALIGN": 16, "FORGET_ALIGN": 16}
    yield "prepare", prepare.prepare_kernel, {}, prefill.PREPARE, constants
    yield "intra", intra.intra_kernel, {}, prefill.INTRA, chunk | {"LEVELS": prefill.CHUNK.bit_length() - 1}
    passes = {"states": (0, 0, 0), "states, exported": (0, 0, 1), "states of segments": (1, 0, 0)}
    passes |= {"states of segments, exported": (1, 0, 1), "summary": (1, 1, 0)}
    for name, flags in passes.items():
        constants = chunk | columns | {"TAPS": 4, "WINDOW": 4}
        constants |= dict(zip(("SEGMENTS", "SUMMARY", "EXPORTS"), map(bool, flags), strict=True))
        yield name, states.states_kernel, {}, prefill.STATES, constants
    yield "combine", states.combine_kernel, {}, prefill.COMBINE, size | columns
    yield "output", output.output_kernel, {}, prefill.OUTPUT, chunk | columns | {"SEGMENTS": False}


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
        f"For sm_90 by Triton {triton.__version__}, without a GPU; bf16 rows, fp32 state unless named, 4 taps.",
        "Stack bytes a thread are spilled registers; HGMMA are the tensor cores' instructions.",
        "",
        "| kernel | head size | registers | stack | shared bytes | HGMMA |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for dim in arguments.dims:
        for name, kernel, types, options, constants in variants(dim):
            if arguments.only not in name:
                continue
            row = report(kernel, types, options, constants)
            lines.append(f"| {name} | {dim} | " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
