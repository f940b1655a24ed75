"""From config.json's dictionary to a checked, frozen `Geometry`. Standard library only.

What cannot be run raises `ConfigError` with one sentence: the field, its value, the remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.fields import checked_fields, is_int, original_keys

CPU_LATENT = (512, 64)
# The reference leaves the latent norm at its default, which is not the model's rms_norm_eps of 1e-5.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model and how it is split. Layer numbers are 0-based here, unlike in config.json.

    Sizes are of the whole model; what a tensor-parallel rank holds is in `memory`.
    """

    hidden_size: int
    vocab_size: int
    max_context: int | None  # tokens, where the config says
    layer_kinds: tuple[str, ...]  # "kda" or "mla"
    layer_moe: tuple[bool, ...]  # experts, or one dense MLP
    kda_heads: int  # 0 without KDA layers, like the next two
    kda_head_dim: int  # K = V
    conv_taps: int
    attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # of the part of the key that all heads share; never rotated
    v_head_dim: int
    kv_lora_rank: int
    intermediate_size: int
    moe_intermediate_size: int  # 0 without experts, like the rest of this group
    num_experts: int
    experts_per_token: int
    shared_experts: int
    expert_groups: int
    topk_groups: int
    renormalize: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    tied_embeddings: bool  # the output matrix is the embedding
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def kda_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "kda")

    @property
    def mla_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "mla")

    @property
    def kda_size(self) -> int:
        """P = heads x head dim: channels of each of q, k and v."""
        return self.kda_heads * self.kda_head_dim

    @property
    def latent_size(self) -> int:
        """Values that MLA caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> "Geometry":
        """Checks a config.json, the original's or one that transformers saved.

        Raises ConfigError at the first field that cannot be run.
        """
        for size, flag in ((tensor_parallel, "tensor-parallel"), (pipeline_parallel, "pipeline-parallel")):
            if not is_int(size) or size < 1:
                raise ConfigError(f"--{flag}-size is {size!r}; give a whole number from 1")
        fields = checked_fields(original_keys(config))
        geometry = cls(**fields, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
        _check_parallel(geometry)
        return geometry

    @classmethod
    def from_hf(cls, hf_config: Any, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> "Geometry":
        """Checks a loaded config object: vLLM's KimiLinearConfig, or transformers' own class of that name."""
        return cls.from_config(
            hf_config.to_dict(), tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel
        )


def check_cpu(geometry: Geometry) -> None:
    """Raises ConfigError if the CPU's MLA kernel cannot hold this model's latent."""
    for name, needed in zip(("kv_lora_rank", "qk_rope_head_dim"), CPU_LATENT, strict=True):
        found = getattr(geometry, name)
        if found != needed:
            raise ConfigError(f"{name} is {found}; the CPU's MLA kernel holds only {needed}, serve this model on a GPU")


def check_cache_dtypes(
    kv_cache_dtype: str,
    mamba_cache_dtype: str,
    mamba_ssm_cache_dtype: str,
    device: str,
    model_dtype: str = "auto",
) -> None:
    """Raises ConfigError for a cache dtype that would be ignored or that no kernel here reads.

    The names are the values of vLLM's flags; `device` is "cpu" or "cuda"; `model_dtype`, where known, is also
    accepted by name. `mamba_cache_dtype` is the convolution state's, `mamba_ssm_cache_dtype` the recurrent one's.
    """
    same = {"auto", model_dtype}
    state = {"auto", "float32"} | ({"bfloat16"} if device == "cuda" else set())
    allowed = {
        "kv-cache-dtype": (kv_cache_dtype, same),
        "mamba-cache-dtype": (mamba_cache_dtype, same),
        "mamba-ssm-cache-dtype": (mamba_ssm_cache_dtype, state),
    }
    for flag, (value, choices) in allowed.items():
        if value not in choices:
            raise ConfigError(f"--{flag} is {value}; on {device} this model takes {' or '.join(sorted(choices))}")


def _check_parallel(geometry: Geometry) -> None:
    ranks = geometry.tensor_parallel
    for name, size in (
        ("linear_attn_config.num_heads", geometry.kda_heads),
        ("num_attention_heads", geometry.attention_heads),
        ("intermediate_size", geometry.intermediate_size),
        ("moe_intermediate_size", geometry.moe_intermediate_size),
    ):
        if size % ranks:
            raise ConfigError(f"{name} is {size}; --tensor-parallel-size {ranks} must divide it, choose another")
    if geometry.pipeline_parallel > geometry.num_layers:
        raise ConfigError(
            f"num_hidden_layers is {geometry.num_layers}; --pipeline-parallel-size "
            f"{geometry.pipeline_parallel} leaves a stage without a layer, choose at most that many"
        )
