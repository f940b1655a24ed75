"""Latent attention of a decode step on a Hopper: into how many parts a context may be cut, and vLLM's two kernels.

    PYTHONPATH=kernels python -m bench.latent_decode --out docs/benchmarks/latent-decode.md

One layer of one rank's heads, bf16, in a CUDA graph. FLASH_ATTN_MLA, vLLM's first choice and ours, must be told at
capture how many parts a sequence may be cut into (`vllm_kimi_linear/attention/mla_splits.py`); FLASHMLA chooses itself.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from bench.data_sheet import bandwidth

K, MILLION = 1024, 1_048_000  # tokens; with an answer a million fit the model's context
LATENT, ROPE, NOPE = 512, 64, 128  # channels, of the 48B
SCALE = (NOPE + ROPE) ** -0.5
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

    query: Tensor  # [sequences, heads, LATENT + ROPE]
    cache: Tensor  # [pages, PAGE, LATENT + ROPE]
    table: Tensor  # [sequences, pages of the longest] int32
    lengths: Tensor  # [sequences] int32

    @classmethod
    def of(cls, heads: int, lengths: list[int]) -> "Step":
        torch.manual_seed(0)
        pages = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
        size = LATENT + ROPE
        return cls(
            query=torch.randn(len(lengths), heads, size, dtype=torch.bfloat16, device="cuda"),
            cache=torch.randn(sum(pages), PAGE, size, dtype=torch.bfloat16, device="cuda"),
            table=torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).cuda(),
            lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        )

    def flash_attention(self, parts: int) -> Callable[[], Tensor]:
        """As FLASH_ATTN_MLA calls it: the work is shared out before the step, outside the graph."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

        longest = int(self.lengths.max())
        starts = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device="cuda")
        shares = get_scheduler_metadata(
            batch_size=len(self.lengths),
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=self.query.shape[1],
            num_heads_kv=1,
            headdim=ROPE,
            headdim_v=LATENT,
            cache_seqlens=self.lengths,
            qkv_dtype=self.cache.dtype,
            page_size=PAGE,
            cu_seqlens_q=starts,
            causal=True,
            num_splits=parts,
        )
        return lambda: flash_attn_varlen_func(
            q=self.query[..., LATENT:],
            k=self.cache[..., LATENT:].unsqueeze(-2),
            v=self.cache[..., :LATENT].unsqueeze(-2),
            q_v=self.query[..., :LATENT],
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=self.lengths,
            block_table=self.table,
            softmax_scale=SCALE,
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
            head_dim_v=LATENT,
            tile_scheduler_metadata=shares,
            softmax_scale=SCALE,
            causal=True,
        )[0].squeeze(1)


def microseconds(call: Callable[[], Tensor]) -> float:
    """Median of CUDA-graph replays."""
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=50, return_mode="median")


def row(name: str, step: Step, bytes_a_second: float) -> str:
    """Raises AssertionError where two ways differ by more than rounding."""
    calls = {str(parts): step.flash_attention(parts) for parts in PARTS} | {"FLASHMLA": step.flash_mla()}
    wanted = calls[str(PARTS[0])]().float()
    times = []
    for way, call in calls.items():
        error = (call().float() - wanted).norm() / wanted.norm()
        assert error < 0.01, (name, way, float(error))
        times.append(microseconds(call))
    floor = 1e6 * 2 * step.cache.shape[-1] * int(step.lengths.sum()) / bytes_a_second
    gain = times[0] / times[PARTS.index(128)]
    return f"| {name} | " + " | ".join(f"{time:.1f}" for time in times) + f" | {gain:.2f} | {floor:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="write the table here")
    parser.add_argument("--heads", type=int, default=32, help="of this rank")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    bytes_a_second = bandwidth(device)
    lines = [
        "# Latent attention of a decode step",
        "",
        f"    PYTHONPATH=kernels python -m bench.latent_decode --heads {args.heads} --out {args.out}",
        "",
        f"{device}, torch {torch.__version__}. One layer, {args.heads} heads, bf16, us, by the most parts a sequence "
        f"is cut into ({PARTS[0]}: vLLM's default; 128: ours, for few sequences), and FLASHMLA. The floor reads the "
        f"latents at {bytes_a_second / 1e12} TB/s.",
        "",
        "| sequences | " + " | ".join(map(str, PARTS)) + " | FLASHMLA | 128: times faster | floor |",
        "| --- " * (len(PARTS) + 4) + "|",
    ]
    for name, lengths in BATCHES.items():
        lines.append(row(name, Step.of(args.heads, lengths), bytes_a_second))
        print(lines[-1], flush=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
