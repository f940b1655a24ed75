"""How a model is split over ranks. Standard library only."""

from dataclasses import dataclass

from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.fields import is_int
from vllm_kimi_linear.config.model import ModelSizes


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks of one server: each holds a share of every layer of its stage of the pipeline."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def check(self, model_sizes: ModelSizes) -> None:
        """Raises ConfigError if this model cannot be split so."""
        ranks, stages = self.tensor_parallel, self.pipeline_parallel
        for size, flag in ((ranks, "tensor-parallel"), (stages, "pipeline-parallel")):
            if not is_int(size) or size < 1:
                raise ConfigError(f"--{flag}-size is {size!r}; give a whole number from 1")
        for name, size in (
            ("linear_attn_config.num_heads", model_sizes.kda_heads),
            ("num_attention_heads", model_sizes.attention_heads),
            ("intermediate_size", model_sizes.intermediate_size),
            ("moe_intermediate_size", model_sizes.moe_intermediate_size),
        ):
            if size % ranks:
                raise ConfigError(f"{name} is {size}; --tensor-parallel-size {ranks} must divide it, choose another")
        if stages > model_sizes.num_layers:
            raise ConfigError(
                f"num_hidden_layers is {model_sizes.num_layers}; --pipeline-parallel-size "
                f"{stages} leaves a stage without a layer, choose at most that many"
            )
