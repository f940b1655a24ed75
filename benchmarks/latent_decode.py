"""Latent attention of a decode step on a Hopper: into how many parts a context may be cut, and vLLM's two kernels.

    python -m benchmarks.latent_decode --out docs/benchmarks/latent-decode.md

One layer of one rank's heads, bf16, in a CUDA graph. FLASH_ATTN_MLA, vLLM's first choice and ours, must be told at
capture how many parts a sequence may be cut into (`attention/mla_splits.py`); FLASHMLA chooses by itself.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.common import BANDWIDTHS, CONFIG, MILLION
from vllm_kimi_linear.config.model import ModelSizes

K = 1024
BATCHES = {
    "1 x 4K": [4 * K],
    "1 x 32K": [32 * K],
    "1 x 128K": [128 * K],
    "1 x 1M": [MILLION],
    "2 x 512K": [512 * K] * 2,
    "8 x 4K": [4 * K] * 8,
    "8 x 128K": [128 * K] * 8,
    "32 x 4K": [4 * K] * 32,
    "1 x 1M, 31 x 4K": [MILLION] + [4 * K] * 31,
}
PARTS = (32, 64, 128, 256)
PAGE = 64  # tokens, what FLASHMLA takes


@dataclass(frozen=True)
class Step:
    """One token of each sequence against a cache of latents in pages, which lie in random order."""

    query: Tensor  # [sequences, heads, latent + shared]
    cache: Tensor  # [pages, PAGE, latent + shared]
    table: Tensor  # [sequences, pages of the longest] int32
    lengths: Tensor  # [sequences] int32
    latent: int
    scale: float

    @classmethod
    def of(cls, model_sizes: ModelSizes, heads: int, lengths: list[int]) -> "Step":
        torch.manual_seed(0)
        pages = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
        size = model_sizes.kv_lora_rank + model_sizes.qk_rope_head_dim
        return cls(
            query=torch.randn(len(lengths), heads, size, dtype=torch.bfloat16, device="cuda"),
            cache=torch.randn(sum(pages), PAGE, size, dtype=torch.bfloat16, device="cuda"),
            table=torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).cuda(),
            lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            latent=model_sizes.kv_lora_rank,
            scale=(model_sizes.qk_nope_head_dim + model_sizes.qk_rope_head_dim) ** -0.5,
        )

    def flash_attention(self, parts: int) -> Callable[[], Tensor]:
        """As FLASH_ATTN_MLA calls it: the work is shared out before the step, outside the graph."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

        latent, size = self.latent, self.cache.shape[-1]
        longest = int(self.lengths.max())
        starts = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device="cuda")
        shares = get_scheduler_metadata(
            batch_size=len(self.lengths),
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=self.query.shape[1],
            num_heads_kv=1,
            headdim=size - latent,
            headdim_v=latent,
            cache_seqlens=self.lengths,
            qkv_dtype=self.cache.dtype,
            page_size=PAGE,
            cu_seqlens_q=starts,
            causal=True,
            num_splits=parts,
        )
        return lambda: flash_attn_varlen_func(
            q=self.query[..., latent:],
            k=self.cache[..., latent:].unsqueeze(-2),
            v=self.cache[..., :latent].unsqueeze(-2),
            q_v=self.query[..., :latent],
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=self.lengths,
            block_table=self.table,
            softmax_scale=self.scale,
            causal=True,
            fa_version=3,
            scheduler_metadata=shares,
            num_splits=parts,
        )

    def flash_mla(self) -> Callable[[], Tensor]:
        from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

        shares, _ = get_mla_metadata(self.lengths, self.query.shape[1], 1)
        return lambda: flash_mla_with_kvcache(
            q=self.query.unsqueeze(1),
            k_cache=self.cache.unsqueeze(-2),
            block_table=self.table,
            cache_seqlens=self.lengths,
            head_dim_v=self.latent,
            tile_scheduler_metadata=shares,
            softmax_scale=self.scale,
            causal=True,
        )[0].squeeze(1)


def microseconds(call: Callable[[], Tensor]) -> float:
    """Median of CUDA-graph replays."""
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=50, return_mode="median")


def row(name: str, step: Step, bandwidth: float) -> str:
    """Raises AssertionError where two ways differ by more than rounding."""
    calls = {str(parts): step.flash_attention(parts) for parts in PARTS} | {"FLASHMLA": step.flash_mla()}
    wanted = calls[str(PARTS[0])]().float()
    times = []
    for way, call in calls.items():
        error = (call().float() - wanted).norm() / wanted.norm()
        assert error < 0.01, (name, way, float(error))
        times.append(microseconds(call))
    floor = 1e6 * 2 * step.cache.shape[-1] * int(step.lengths.sum()) / bandwidth
    gain = times[0] / times[PARTS.index(128)]
    return f"| {name} | " + " | ".join(f"{time:.1f}" for time in times) + f" | {gain:.2f} | {floor:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="write the table here")
    parser.add_argument("--heads", type=int, default=32, help="of this rank")
    args = parser.parse_args()
    model_sizes = ModelSizes.from_config(json.loads(CONFIG.read_text()))
    device = torch.cuda.get_device_name()
    bandwidth = next((value for name, value in BANDWIDTHS.items() if name in device), BANDWIDTHS["H100"])
    lines = [
        "# Latent attention of a decode step",
        "",
        f"    python -m benchmarks.latent_decode --heads {args.heads} --out {args.out}",
        "",
        f"{device}, torch {torch.__version__}. One layer, {args.heads} heads, bf16, us, by the most parts a sequence "
        f"is cut into ({PARTS[0]}: vLLM's default; 128: ours, for few sequences), and FLASHMLA. The floor reads the "
        f"latents at {bandwidth / 1e12} TB/s.",
        "",
        "| sequences | " + " | ".join(map(str, PARTS)) + " | FLASHMLA | 128: times faster | floor |",
        "| --- " * (len(PARTS) + 4) + "|",
    ]
    for name, lengths in BATCHES.items():
        lines.append(row(name, Step.of(model_sizes, args.heads, lengths), bandwidth))
        print(lines[-1], flush=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
