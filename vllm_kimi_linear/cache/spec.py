"""What vLLM is told about the state of a KDA layer."""

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from vllm_kimi_linear.cache.layout import KERNEL_BLOCK, CacheLayout


@dataclass(frozen=True, kw_only=True)
class KdaSpec(MambaSpec):
    """The state of a KDA layer, kept along a prompt as `manager.py` says."""

    most_blocks: int = 0  # of the longest sequence
    groups: int = 1  # of KDA layers
    block_multiple: int = 1  # bytes, of which a block of the pool is a multiple

    @classmethod
    def of(cls, spec: KVCacheSpec, max_model_len: int, layout: CacheLayout) -> "KdaSpec":
        assert isinstance(spec, MambaSpec)
        values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(
            **values,
            most_blocks=cdiv(max_model_len, spec.block_size),
            groups=layout.kda_groups,
            block_multiple=KERNEL_BLOCK * layout.latent_bytes,
        )

    def get_block_stride_alignment(self) -> int:
        return self.block_multiple
