"""The kernels of vLLM 0.32.0 and of fla-core 0.6.0, chained as their layers chain them.

vLLM need not be installed. `PYTHONPATH=kernels python -m bench.peers SITE DEST` copies the Python files of its
kernels out of an installed vLLM; what they import from the rest of vLLM is stood in for here.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases

VLLM_FILES = (
    "vllm/third_party/flash_linear_attention/ops/*.py",
    "vllm/models/kimi_k3/nvidia/ops/third_party/kda/*.py",
    "vllm/model_executor/layers/mamba/ops/causal_conv1d.py",
    "vllm/model_executor/layers/mamba/ops/gather_initial_states.py",
)
# Packages of which nothing but what lies in them is wanted.
EMPTY = (
    "vllm",
    "vllm.utils",
    "vllm.third_party",
    "vllm.third_party.flash_linear_attention",
    "vllm.third_party.flash_linear_attention.ops",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.mamba",
    "vllm.model_executor.layers.mamba.ops",
    "vllm.models",
    "vllm.models.kimi_k3",
    "vllm.models.kimi_k3.nvidia",
    "vllm.models.kimi_k3.nvidia.ops",
    "vllm.models.kimi_k3.nvidia.ops.third_party",
    "vllm.v1",
    "vllm.v1.attention",
    "vllm.v1.attention.backends",
)
PLACE = Path(__file__).parents[2] / ".gpu" / "peers"
PIECES = 4


def collect(site: Path, place: Path) -> None:
    """Copy the kernels' files from site-packages `site` to `place`."""
    for pattern in VLLM_FILES:
        for source in site.glob(pattern):
            if source.name == "__init__.py" and "flash_linear" in str(source):
                continue  # imports more than the kernels
            target = place / source.relative_to(site)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def stand_in(place: Path = PLACE) -> None:
    """Make the copied files importable as `vllm...`."""
    import triton
    import triton.language as tl
    import triton.language.extra.libdevice as tldevice

    def module(name: str, **contents: object) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        made.__path__ = [str(place / name.replace(".", "/"))]
        sys.modules[name] = made

    class Platform:
        def __getattr__(self, name: str) -> Callable[..., bool]:
            return lambda *_: name in ("is_cuda", "is_cuda_alike", "has_device_capability", "is_arch_support_pdl")

    class CustomOp(torch.nn.Module):
        @staticmethod
        def register(*_: Any, **__: Any) -> Callable[[type], type]:
            return lambda cls: cls

    def cdiv(a: int, b: int) -> int:
        return -(a // -b)

    for name in EMPTY:
        module(name)
    module("vllm.triton_utils", triton=triton, tl=tl, tldevice=tldevice, LOG2E=1.4426950408889634)
    module("vllm.platforms", current_platform=Platform())
    module("vllm.model_executor.custom_op", CustomOp=CustomOp)
    math = {"cdiv": cdiv, "next_power_of_2": triton.next_power_of_2, "RCP_LN2": 1.4426950216}
    module("vllm.utils.math_utils", **math)
    module("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    module("vllm.utils.torch_utils", async_tensor_h2d=lambda x, device, dtype: x.to(device, dtype))
    module("vllm.v1.attention.backends.utils", NULL_BLOCK_ID=0, PAD_SLOT_ID=-1)


def tune(piece: int | None = None) -> None:
    """Have the peers' kernels choose among their configurations by 25 ms of each; or only try every PIECES-th one."""
    import triton
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    os.environ.setdefault("FLA_CACHE_RESULTS", "0")
    driver.active.get_benchmarker = lambda: (
        lambda call, quantiles: triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)
    )
    if piece is not None:
        prune = Autotuner.prune_configs
        Autotuner.prune_configs = lambda *a, **k: prune(*a, **k)[piece::PIECES] or prune(*a, **k)[:1]


def compile_all(heads: list[int]) -> None:
    """Compile what the peers will choose from, in as many processes as there are cores, into Triton's cache."""
    jobs = [(name, str(h), str(piece)) for h in heads for name in ("vllm", "fla") for piece in range(PIECES)]
    command = [sys.executable, "-m", "bench.peers", "compile"]
    run = [subprocess.Popen([*command, *job], stderr=subprocess.PIPE) for job in jobs]
    for job, process in zip(jobs, run, strict=True):
        error = process.communicate()[1].decode()
        if process.returncode:
            print("not compiled ahead:", *job, error[-300:], flush=True)


def _compile(name: str, heads: int, piece: int) -> None:
    tune(piece)
    stand_in()
    case = cases.make([2048], heads)
    (VllmChain if name == "vllm" else FlaChain)(case).prefill()
    torch.cuda.synchronize()


class VllmChain:
    """vLLM 0.32.0's KDA layer between its projections and o_proj, for one case."""

    def __init__(self, case: cases.Case) -> None:
        from vllm.model_executor.layers.mamba.ops import causal_conv1d
        from vllm.model_executor.layers.mamba.ops.gather_initial_states import gather_initial_states
        from vllm.models.kimi_k3.nvidia.ops.third_party import kda
        from vllm.third_party.flash_linear_attention.ops.kda import rms_norm_gated

        self.conv, self.gather, self.kda, self.norm = causal_conv1d, gather_initial_states, kda, rms_norm_gated
        self.case, params = case, case.params
        self.heads, self.dim = params.heads, params.head_dim
        self.core = torch.empty_like(case.out).view(1, -1, self.heads, self.dim)
        self.metadata = _conv_metadata(case.cu_seqlens)

    def _finish(self, o: Tensor, tokens: slice) -> Tensor:
        core, params = self.core[:, tokens], self.case.params
        core[0] = o[0]
        gate = self.case.inputs.output_gate[tokens].unflatten(1, (self.heads, self.dim))
        core.copy_(self.norm(core, gate, params.norm_weight, None, "sigmoid", eps=params.norm_eps))
        return core

    def decode(self, state_indices: Tensor, tokens: slice = slice(None)) -> Tensor:
        inputs, params, state = self.case.inputs, self.case.params, self.case.state
        qkv = inputs.qkv[tokens]
        mixed = self.conv.causal_conv1d_update(
            qkv,
            state.conv.transpose(-1, -2),
            params.conv_weight,
            None,
            activation="silu",
            conv_state_indices=state_indices,
            validate_data=False,
            out=torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
        )
        o, _ = self.kda.fused_recurrent_kda_packed_decode(
            mixed_qkv=mixed,
            raw_g=inputs.g[tokens].unflatten(1, (self.heads, self.dim))[None],
            raw_beta=inputs.beta[tokens][None],
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            lower_bound=None,
            initial_state=state.recurrent,
            state_indices=state_indices,
        )
        return self._finish(o, tokens)

    def prefill(self) -> Tensor:
        case, (heads, dim) = self.case, (self.heads, self.dim)
        inputs, params, state = case.inputs, case.params, case.state
        width = heads * dim
        parts = []
        for part in range(3):
            columns = slice(part * width, (part + 1) * width)
            mixed = self.conv.causal_conv1d_fn(
                inputs.qkv[:, columns].transpose(0, 1),
                params.conv_weight[columns],
                None,
                activation="silu",
                conv_states=state.conv.transpose(-1, -2)[:, columns],
                has_initial_state=case.has_initial_state,
                cache_indices=case.state_indices,
                query_start_loc=case.cu_seqlens,
                metadata=self.metadata,
            )
            parts.append(mixed.transpose(0, 1).unflatten(1, (heads, dim))[None])
        initial = self.gather(state.recurrent, case.state_indices, case.has_initial_state)
        o, last = self.kda.chunk_kda_with_fused_gate(
            q=parts[0],
            k=parts[1],
            v=parts[2],
            raw_g=inputs.g.unflatten(1, (heads, dim))[None],
            raw_beta=inputs.beta[None],
            A_log=params.A_log,
            g_bias=params.dt_bias,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=case.cu_seqlens,
        )
        state.recurrent[case.state_indices] = last
        return self._finish(o, slice(None))


class FlaChain:
    """fla-core 0.6.0: its convolution, chunk_kda and gated norm around gathered and scattered states."""

    def __init__(self, case: cases.Case) -> None:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.kda import chunk_kda

        self.conv, self.norm, self.chunk = causal_conv1d, rms_norm_gated, chunk_kda
        self.case = case
        self.cu_seqlens, self.cu_seqlens_cpu = case.cu_seqlens.long(), case.cu_seqlens.cpu().long()

    @torch.no_grad()
    def prefill(self) -> Tensor:
        case, inputs, params = self.case, self.case.inputs, self.case.params
        heads, dim = params.heads, params.head_dim
        bounds = {"cu_seqlens": self.cu_seqlens, "cu_seqlens_cpu": self.cu_seqlens_cpu}
        mixed, _ = self.conv(inputs.qkv[None], params.conv_weight, activation="silu", **bounds)
        q, k, v = (x.unflatten(2, (heads, dim)).contiguous() for x in mixed.chunk(3, dim=2))
        index = case.state_indices.long()
        initial = case.state.recurrent[index] * case.has_initial_state[:, None, None, None]
        o, last = self.chunk(
            q=q,
            k=k,
            v=v,
            g=inputs.g.unflatten(1, (heads, dim))[None],
            beta=inputs.beta[None].contiguous(),
            A_log=params.A_log,
            dt_bias=params.dt_bias,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
            **bounds,
        )
        case.state.recurrent[index] = last
        gate = inputs.output_gate.unflatten(1, (heads, dim))[None]
        return self.norm(o, gate, params.norm_weight, None, "sigmoid", eps=params.norm_eps)


def _conv_metadata(cu_seqlens: Tensor) -> types.SimpleNamespace:
    """What vLLM's metadata builder precomputes for its convolution: the sequence and piece of each program."""
    pieces = -(-cu_seqlens.cpu().diff() // 8)
    batch = torch.repeat_interleave(torch.arange(len(pieces)), pieces).to(torch.int32)
    piece = torch.cat([torch.arange(n) for n in pieces.tolist()]).to(torch.int32)
    batch, piece = batch.to(cu_seqlens.device), piece.to(cu_seqlens.device)
    entry = {"tot": int(pieces.sum()), "mlist": batch, "mlist_len": len(batch), "offsetlist": piece}
    entry |= {"batch_ptr": batch, "token_chunk_offset_ptr": piece}
    return types.SimpleNamespace(nums_dict={8: entry}, batch_ptr=batch, token_chunk_offset_ptr=piece)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        _compile(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        collect(Path(sys.argv[1]), Path(sys.argv[2]))
