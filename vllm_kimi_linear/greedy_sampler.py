"""vLLM's sampler, in one launch where every request of a step takes its likeliest token and asks for nothing else."""

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS


class GreedySampler(Sampler):
    """The same object as the sampler that it is made of, but for what a call does."""

    one: torch.Tensor  # [requests], of each
    none: torch.Tensor
    asked: tuple[list[str], bool]  # requests, and whether all of them are greedy
    profiled: bool  # vLLM's first call measures the sampler's memory and compiles its kernels

    @classmethod
    def of(cls, sampler: Sampler) -> "GreedySampler":
        ours = object.__new__(cls)
        ours.__dict__ = sampler.__dict__
        ours.asked, ours.profiled = ([], False), False
        return ours

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        """logits [requests, vocabulary]."""
        if not self.profiled or input_batch.has_prefill or input_batch.num_draft_tokens:
            self.asked = [], False  # a request that begins may have the name of one that ended
            # `of` is called while weights are loaded: of what is made there sleep mode brings back the weights alone.
            if not self.profiled:
                most = len(self.needs_logits_processing)
                self.one = torch.ones(most, dtype=torch.int32, device=logits.device)
                self.none = torch.zeros_like(self.one)
                self.profiled = True
            return super().__call__(logits, input_batch)
        if not self.greedy(input_batch):
            return super().__call__(logits, input_batch)
        requests = input_batch.num_reqs
        return SamplerOutput(
            sampled_token_ids=logits.argmax(-1, keepdim=True),  # of equals the first, as vLLM's kernel
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=self.one[:requests],
            num_rejected=self.none[:requests],
        )

    def greedy(self, input_batch: Any) -> bool:
        """Whether all requests of the batch are; asked once of the same ones, for what they ask does not change."""
        asked, answer = self.asked
        if asked != input_batch.req_ids:
            rows = input_batch.idx_mapping_np
            answer = not (
                self.compute_nans
                or self.return_sampling_mask
                or self.trace_replay_state is not None
                or self.needs_logits_processing[rows].any()
                or self.sampling_states.temperature.np[rows].any()
                or self.sampling_states.max_num_logprobs(rows) != NO_LOGPROBS
                or self.logprob_token_ids_state.max_num_token_ids(rows)
            )
            self.asked = list(input_batch.req_ids), answer
        return answer
