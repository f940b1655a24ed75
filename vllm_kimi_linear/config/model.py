"""From config.json's dictionary to the checked, frozen sizes of a model. Standard library only.

What cannot be run raises `ConfigError` with one sentence: the field, its value, the remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.fields import checked_fields, original_keys
from vllm_kimi_linear.config.quantization import FIELD, Quantization

CPU_LATENT = (512, 64)
GPU_FORMS = ("fp8", "packed4")  # of quantised weights
# The reference leaves the latent norm at its default, which is not the model's rms_norm_eps of 1e-5.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of one whole model. Layer numbers are 0-based here, unlike in config.json."""

    hidden_size: int
    vocab_size: int
    max_context: int | None  # tokens, where the config says
    layer_types: tuple[str, ...]  # "kda" or "mla"
    layer_moe: tuple[bool, ...]  # experts, or one dense MLP
    attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # of the part of the key that all heads share; never rotated
    v_head_dim: int
    kv_lora_rank: int
    rms_norm_eps: float
    tied_embeddings: bool  # the output matrix is the embedding
    quantization: Quantization | None = None
    # Without KDA layers.
    kda_heads: int = 0
    kda_head_dim: int = 0  # K = V
    conv_kernel_size: int = 0
    # Without a dense MLP.
    intermediate_size: int = 0
    # Without experts.
    moe_intermediate_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    expert_groups: int = 0
    topk_groups: int = 0
    renormalize: bool = False
    routed_scaling_factor: float = 0.0

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def kda_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "kda")

    @property
    def mla_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "mla")

    @property
    def kda_size(self) -> int:
        """P = heads x head dim: channels of each of q, k and v."""
        return self.kda_heads * self.kda_head_dim

    @property
    def latent_size(self) -> int:
        """Values that MLA caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSizes":
        """Checks a config.json, the original's or one that transformers saved.

        Raises ConfigError at the first field that cannot be run.
        """
        return cls(**checked_fields(original_keys(config)))

    @classmethod
    def from_hf(cls, hf_config: Any) -> "ModelSizes":
        """Checks a loaded config object: vLLM's KimiLinearConfig, or transformers' own class of that name."""
        return cls.from_config(hf_config.to_dict())


def check_device(model_sizes: ModelSizes, device: str) -> None:
    """Raises ConfigError for what the device, "cpu" or "cuda", does not serve: latents, weights as they are stored."""
    if device != "cpu":
        schemes = [scheme for _, scheme in model_sizes.quantization.targets] if model_sizes.quantization else []
        for scheme in schemes:
            if scheme.form not in GPU_FORMS:
                raise ConfigError(f"{FIELD} stores {scheme.form}; GPUs serve only {' and '.join(GPU_FORMS)}")
        return
    for name, needed in zip(("kv_lora_rank", "qk_rope_head_dim"), CPU_LATENT, strict=True):
        found = getattr(model_sizes, name)
        if found != needed:
            raise ConfigError(f"{name} is {found}; the CPU's MLA kernel takes only {needed}, serve this model on a GPU")


def check_cache_dtypes(kv_cache_dtype: str, mamba_cache_dtype: str, mamba_ssm_cache_dtype: str, device: str) -> None:
    """Raises ConfigError for a cache dtype that would be ignored or that no kernel here reads.

    The names are the values of vLLM's flags; `device` is "cpu" or "cuda". `mamba_cache_dtype` is the convolution
    state's, `mamba_ssm_cache_dtype` the recurrent one's.
    """
    state = {"auto", "float32"} | ({"bfloat16"} if device == "cuda" else set())
    allowed = {
        "kv-cache-dtype": (kv_cache_dtype, {"auto"}),
        "mamba-cache-dtype": (mamba_cache_dtype, {"auto"}),
        "mamba-ssm-cache-dtype": (mamba_ssm_cache_dtype, state),
    }
    for flag, (value, choices) in allowed.items():
        if value not in choices:
            raise ConfigError(f"--{flag} is {value}; on {device} this model takes {' or '.join(sorted(choices))}")
