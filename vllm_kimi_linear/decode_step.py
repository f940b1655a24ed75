"""Steps of one token for each sequence, few on a GPU: when they take the kernels of `decode_kernels`.

Whether a model can is decided once, whether a step does by its tokens; a CUDA graph is captured for one or the other.
"""

from collections.abc import Collection

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from kda_kernels import interface
from vllm_kimi_linear.attention.kda_metadata import KdaMetadata
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.log import logger

MAX_TOKENS = 8  # on a GPU; on a CPU any number
CPU_EXPERTS = {"CPU", "QuantizedExperts"}
GPU_EXPERTS = {"TRITON", "VLLM_CUTLASS", "MARLIN", "HUMMING"}  # the last two by vLLM's kernels, in a step of ours


def why_not(vllm_config: VllmConfig, sizes: ModelSizes, moe_backends: Collection[str]) -> str | None:
    """Why the layers of this configuration do not take these kernels, or None if they do.

    moe_backends: vLLM's names of those that its layers of experts run on; some take no experts that others chose.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    state = torch.bfloat16 if vllm_config.cache_config.mamba_ssm_cache_dtype == "bfloat16" else torch.float32
    cpu = current_platform.is_cpu()
    if not cpu and not current_platform.is_cuda():
        return "the plugin's kernels are for NVIDIA GPUs and for CPUs"
    if not vllm_config.additional_config.get("decode_kernels", True):
        return "turned off by --additional-config '{\"decode_kernels\": false}'"
    if cpu:
        from vllm_kimi_linear.cpu.products import takes_c_kernels

        if not takes_c_kernels(model.dtype, sizes.kv_lora_rank):
            return f"the C kernels do not take {model.dtype} and {sizes.kv_lora_rank} latent channels on this processor"
    elif model.dtype != torch.bfloat16:
        return f"the plugin's kernels take bfloat16, not {model.dtype}"
    if vllm_config.lora_config is not None:
        return "the plugin's kernels do not take LoRA"
    if vllm_config.num_speculative_tokens:
        return "the plugin's kernels do not take drafted tokens"
    if parallel.enable_expert_parallel or parallel.data_parallel_size > 1:
        return "the plugin's kernels do not take expert or data parallelism"
    if sizes.expert_groups != 1:
        return f"the plugin's kernels take one group of experts, not {sizes.expert_groups}"
    if not sizes.kda_layers:
        return "the model has no KDA layer"
    device = "cpu" if cpu else "cuda"
    name, reason = interface.describe(device, model.dtype, sizes.kda_head_dim, state)
    if name != device:
        return reason
    if others := set(moe_backends) - (CPU_EXPERTS if cpu else GPU_EXPERTS):
        return f"the plugin's kernels do not go with experts that run on {min(others)}"
    return None


class DecodeStep:
    """Of one pipeline stage: `kda_layer` is the name of one of its KDA layers, whose metadata tells a step's kind."""

    def __init__(self, kda_layer: str | None, reason: str | None) -> None:
        """`reason`: why they are not taken; None if they are."""
        self.kda_layer = kda_layer if reason is None else None
        if self.kda_layer:
            most = f" of up to {MAX_TOKENS} tokens" if current_platform.is_cuda() else ""
            logger.info_once("Kimi Linear: decode steps%s run on the plugin's kernels", most)
        else:
            reason = reason or "this pipeline stage has no KDA layer"
            logger.info_once("Kimi Linear: decode steps run on vLLM's layers: %s", reason)

    def takes(self, tokens: int) -> bool:
        """Whether this step of so many tokens, those that pad a graph included, only decodes, and few of them.

        Never in a piecewise graph: captured with one step's metadata, it is replayed for any step of as many tokens.
        """
        if self.kda_layer is None or (tokens > MAX_TOKENS and current_platform.is_cuda()):
            return False
        context = get_forward_context()
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            return False
        metadata = (context.attn_metadata or {}).get(self.kda_layer)
        if not isinstance(metadata, KdaMetadata):
            return False
        return metadata.prefill is None and metadata.reordering is None and metadata.num_decode_tokens == tokens
