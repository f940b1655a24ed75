"""Which backend serves a call, and what it says about it."""

import importlib
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kda_kernels import interface, reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaState


@pytest.fixture(autouse=True)
def forget_choices():
    interface._choose.cache_clear()
    yield
    interface._choose.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the C kernels with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_kernels_serve_the_cpu(dtype):
    name, reason = interface.describe("cpu", dtype, 128)
    assert name == "cpu", reason


def test_reference_serves_what_no_backend_can(make_problem, solve, relative_error):
    name, reason = interface.describe("cpu", torch.float32, 20)
    assert name == "reference" and reason
    problem = make_problem([9, 2], dim=20)
    want = solve(problem)[0]
    assert relative_error(problem.prefill(interface).out, want) < 1e-5


def test_environment_turns_fast_backends_off(monkeypatch):
    monkeypatch.setenv("KDA_KERNELS_BACKEND", "reference")
    name, reason = interface.describe("cpu", torch.float32, 64)
    assert name == "reference" and "KDA_KERNELS_BACKEND" in reason


def test_environment_with_a_typing_error_is_refused(monkeypatch):
    monkeypatch.setenv("KDA_KERNELS_BACKEND", "refrence")
    with pytest.raises(ValueError, match="'refrence'; set it to 'auto' or 'reference'"):
        interface.describe("cpu", torch.float32, 64)


def test_backend_that_cannot_be_imported_gives_its_reason(monkeypatch):
    monkeypatch.setitem(interface._FAST_BACKENDS, "cpu", "kda_kernels.no_such_backend")
    name, reason = interface.describe("cpu", torch.float32, 64)
    assert name == "reference" and "no_such_backend" in reason


def test_calls_go_to_the_backend_that_describe_names(monkeypatch, make_problem):
    calls = []
    fake = ModuleType("kda_kernels.fake")
    fake.__dict__.update(
        supports=lambda dtype, head_dim, state_dtype: (head_dim == 32, f"head_dim {head_dim}"),
        decode=lambda *args: calls.append("decode"),
        prefill=lambda *args: calls.append("prefill"),
    )
    monkeypatch.setitem(sys.modules, "kda_kernels.fake", fake)
    monkeypatch.setitem(interface._FAST_BACKENDS, "cpu", "kda_kernels.fake")
    assert interface.describe("cpu", torch.float32, 32) == ("cpu", "head_dim 32")
    assert interface.describe("cpu", torch.float32, 16) == ("reference", "head_dim 16")
    make_problem([1], dim=32).decode(interface).prefill(interface)
    assert calls == ["decode", "prefill"]
    make_problem([1], dim=16).decode(interface)
    assert calls == ["decode", "prefill"]


def test_without_a_device_backend_reference_serves():
    name, reason = interface.describe("meta", torch.float32, 64)
    assert name == "reference" and "meta" in reason
    assert interface._choose("meta", torch.float32, 64, torch.float32)[0] is reference


WRONG_RECORDS = {
    "conv_weight has shape \\[96, 1\\]": lambda p: replace(p, conv_weight=p.conv_weight[:, :1].contiguous()),
    "dt_bias has 31 entries": lambda p: replace(p, dt_bias=p.dt_bias[:31]),
    "conv_weight has strides": lambda p: replace(p, conv_weight=p.conv_weight.T.contiguous().T),
}


@pytest.mark.parametrize("sentence", WRONG_RECORDS)
def test_params_that_do_not_fit_are_refused(sentence, make_problem):
    with pytest.raises(ValueError, match=sentence):
        WRONG_RECORDS[sentence](make_problem([1], dim=16).params)


def test_inputs_and_state_that_do_not_fit_are_refused(make_problem):
    problem = make_problem([4], dim=16)
    inputs, state = problem.inputs, problem.state
    with pytest.raises(ValueError, match="beta has 3 tokens, qkv 4"):
        KdaInputs(inputs.qkv, inputs.g, inputs.beta[:3], inputs.output_gate)
    with pytest.raises(ValueError, match="output_gate is torch\\.bfloat16"):
        KdaInputs(inputs.qkv, inputs.g, inputs.beta, inputs.output_gate.bfloat16())
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        KdaInputs(inputs.qkv, inputs.g, inputs.beta, inputs.output_gate.T.contiguous().T)
    with pytest.raises(ValueError, match="beta is torch\\.float32 on meta, qkv torch\\.float32 on cpu"):
        KdaInputs(inputs.qkv, inputs.g, inputs.beta.to("meta"), inputs.output_gate)
    with pytest.raises(ValueError, match="the state on cpu, state_indices on meta"):
        DecodeArgs(inputs, problem.params, state, problem.state_indices.to("meta"), problem.out)
    with pytest.raises(ValueError, match="each state must be contiguous"):
        KdaState(state.conv, state.recurrent.mT)
    with pytest.raises(ValueError, match="state\\.conv has 3 states"):
        KdaState(state.conv[:3], state.recurrent)
    with pytest.raises(ValueError, match="it must be \\[states, 2, 16, 16\\]"):
        wrong = KdaState(state.conv, torch.zeros(4, 2, 32, 16))
        DecodeArgs(inputs, problem.params, wrong, problem.state_indices, problem.out)


def test_no_gpu_kernel_is_compiled_anew_for_where_a_table_begins():
    """A batch's prefills are the later part of a table, at any address, and a call without checkpoints passes those."""
    pytest.importorskip("triton")
    kernels = {
        "decode": ["kda_decode_kernel"],
        "spec_decode": ["kda_spec_decode_kernel"],
        "conv_gate": ["kda_conv_gate_kernel"],
    }
    kernels |= {"chunk_intra": ["kda_chunk_intra_kernel"], "chunk_o": ["kda_chunk_o_kernel"]}
    kernels |= {"chunk_delta_h": ["kda_chunk_delta_h_kernel", "kda_combine_segments_kernel"]}
    tables = {"state_indices", "checkpoint_offsets", "checkpoint_state_indices"}
    for module, names in kernels.items():
        for name in names:
            kernel = getattr(importlib.import_module(f"kda_kernels.cuda.{module}"), name)
            free = {param.name: param.do_not_specialize_on_alignment for param in kernel.params if param.name in tables}
            assert "state_indices" in free and all(free.values()), (name, free)
