"""Experts run once for every size of step before the first request does, so that none waits for a compiler.

vLLM's Triton kernel for experts has its tiles as constants, and takes them from a table by the number of tokens of a
step (`fused_moe_tables/`, or vLLM's own). Its profile run and the capture of graphs compile some of them.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

from vllm_kimi_linear.log import logger


@dataclass(frozen=True)
class Step:
    """So many tokens through one layer; those of other layers are the same kernels."""

    tokens: int
    layer: nn.Module = field(compare=False, repr=False)
    config: VllmConfig = field(compare=False, repr=False)


class ExpertWarmup(VllmJitKernel[Step]):
    """What vLLM asks of a kernel that is compiled at the start, here for all that a layer of experts calls."""

    def get_warmup_keys(self, layer: nn.Module, config: VllmConfig) -> list[Step]:
        """Every power of two, for tables are made for these, those around them, and the most tokens of a step.

        Triton compiles a kernel anew where an argument is no multiple of 16, as the rows of an odd number of tokens,
        and vLLM's sorts by expert above some number of tokens. The last table serves steps below its number alone.
        None with adapters: their products look up which one each token has, in a list that only a step writes.
        """
        if config.lora_config is not None:
            return []
        most = config.scheduler_config.max_num_batched_tokens
        sizes = {(1 << n) + more for n in range(most.bit_length()) for more in (-1, 0, 1, 2)} | {most - 1, most}
        return [Step(tokens, layer, config) for tokens in sorted(sizes) if 0 < tokens <= most]

    def compile(self, step: Step) -> None:
        """Run the layer; where a single rank fails, say so and let the server start: first requests are only slower."""
        model, device = step.config.model_config, next(step.layer.parameters()).device
        try:
            with torch.inference_mode(), set_forward_context(None, step.config, num_tokens=step.tokens):
                step.layer(torch.zeros(step.tokens, model.get_hidden_size(), dtype=model.dtype, device=device))
        except Exception as error:  # a warmup is not worth a server
            # After an error of its own a device answers nothing; and other ranks wait for this one's part.
            if isinstance(error, torch.AcceleratorError) or step.config.parallel_config.world_size > 1:
                raise
            logger.warning_once("Kimi Linear warmup: experts could not be run with %d tokens: %s", step.tokens, error)


expert_warmup = ExpertWarmup()
