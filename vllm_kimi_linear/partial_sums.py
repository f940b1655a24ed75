"""Sums over ranks in a decode step on GPUs, left to the launch that adds the residual and norms."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import RMSNorm

from decode_kernels import interface
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.decode_step import MAX_TOKENS, DecodeStep
from vllm_kimi_linear.log import logger


@dataclass(frozen=True)
class PartialSums:
    """This rank's part [T, K] of hidden states, of which all ranks' are to be added."""

    own: torch.Tensor


HiddenStates: TypeAlias = torch.Tensor | PartialSums

_workspace: object | None = None  # of this rank; all models of a process have the same ranks


def all_reduce(hidden_states: torch.Tensor) -> HiddenStates:
    """In a step that `DecodeStep` takes."""
    return tensor_model_parallel_all_reduce(hidden_states) if _workspace is None else PartialSums(hidden_states)


def add_parts(
    x: HiddenStates, residual: torch.Tensor | None, norm: RMSNorm
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x and residual [T, K], and the norm's weight; of parts the norm of their sum, the new residual, and None."""
    if not isinstance(x, PartialSums):
        return x, residual, norm.weight
    kernels = interface.kernels(x.own.device.type)
    normed, residual = kernels.all_reduce_add_norm(x.own, residual, norm.weight, norm.variance_epsilon, _workspace)
    return normed, residual, None


def prepare(vllm_config: VllmConfig, sizes: ModelSizes, decode_step: DecodeStep) -> None:
    """Decide whether ranks add their parts so; all of them call it, and reach each other's memory afterwards."""
    global _workspace
    _workspace = None
    parallel, group = vllm_config.parallel_config, get_tp_group()
    custom = getattr(group.device_communicator, "ca_comm", None)
    if (
        group.world_size == 1
        or parallel.pipeline_parallel_size > 1
        or decode_step.kda_layer is None
        or vllm_config.model_config.enable_sleep_mode  # what the workspace holds would be lost
        or not vllm_config.additional_config.get("fused_all_reduce", False)  # compared in one way of serving
    ):
        return
    if custom is None or custom.disabled:
        logger.info_once("Kimi Linear: decode steps add ranks' parts by vLLM's all-reduce, for its custom one is off")
        return
    from decode_kernels.cuda import Workspace

    row_bytes = sizes.hidden_size * vllm_config.model_config.dtype.itemsize
    size = Workspace.buffer_bytes(group.world_size, MAX_TOKENS, row_bytes)
    addresses = custom.create_shared_buffer(size, group=group.cpu_group)  # of zeros
    _workspace = Workspace(
        torch.tensor(addresses, device=group.device),
        torch.zeros(MAX_TOKENS, dtype=torch.int32, device=group.device),
        group.rank_in_group,
    )
    logger.info_once("Kimi Linear: decode steps add ranks' parts in the kernel of the norm")
