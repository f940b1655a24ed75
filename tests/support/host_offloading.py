"""Offloading by vLLM's connector without a GPU: whole pages, copied at once.

vLLM's scheduler side, its managers and its way through a worker are those of a GPU; only the copies are these.
"""

from collections.abc import Sequence

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        sizes = [each.page_size_bytes for each in kv_caches.tensors]
        return HostOffloadingWorker(kv_caches, [torch.zeros(self.num_chunks, size, dtype=torch.int8) for size in sizes])


class HostTieringSpec(TieringOffloadingSpec):
    """With further tiers behind the host's memory, which the scheduler's process reads and writes, too."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        sizes = [each.page_size_bytes for each in kv_caches.tensors]
        return HostOffloadingWorker(kv_caches, [region.create_next_worker_view(size) for size in sizes], region)


class HostOffloadingWorker(OffloadingWorker):
    """Chunks of one block each, as vLLM has them by default."""

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        chunks: Sequence[torch.Tensor],
        region: SharedOffloadRegion | None = None,
    ) -> None:
        self.groups = kv_caches.group_data_refs
        self.blocks = [each.tensor for each in kv_caches.tensors]  # [blocks, bytes]
        self.chunks, self.region = chunks, region  # [chunks, bytes], as many
        self.finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def _copy(self, job_id: int, of_cache: GPULoadStoreSpec, of_host: LoadStoreSpec, store: bool) -> bool:
        assert isinstance(of_host, CPULoadStoreSpec)
        pairs = zip(of_cache.block_ids.tolist(), of_host.chunk_ids.tolist(), strict=True)
        moved = 0
        for group, blocks in enumerate(of_cache.group_sizes):
            for _ in range(blocks):
                block, chunk = next(pairs)
                for ref in self.groups[group]:
                    inside = self.blocks[ref.tensor_idx][block, : ref.page_size_bytes]
                    outside = self.chunks[ref.tensor_idx][chunk, : ref.page_size_bytes]
                    outside.copy_(inside) if store else inside.copy_(outside)
                    moved += ref.page_size_bytes
        self.finished.append(TransferResult(job_id, success=True, transfer_size=moved, transfer_time=1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is done when it is asked for."""

    def shutdown(self) -> None:
        self.chunks = []
        if self.region is not None:
            self.region.cleanup()
