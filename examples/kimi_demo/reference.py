"""The reference that the demo and the tests compare with: transformers' Kimi Linear, in plain torch."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Score:
    """What the reference says about one answer, one entry a token of the answer."""

    answer: list[int]
    argmax: list[int]  # the token that greedy decoding takes here
    logprobs: list[float]  # of the answer's token
    top: list[dict[int, float]]  # the five most likely tokens and their logprobs
    margins: list[float]  # logit of the best token minus logit of the second best
    router_gap: float  # smallest distance, over positions and layers, from the last chosen expert to the next

    @property
    def agrees(self) -> bool:
        """Whether greedy decoding, step by step, gives this very answer."""
        return self.argmax == self.answer

    @property
    def margin(self) -> float:
        return min(self.margins)

    # Transformers in bf16 overturns leads of up to 6.3 on the demo checkpoint (245,760 tokens of random text, six of
    # them above 4.5), whose random weights amplify rounding: every sixth token is another one.
    clear_lead: ClassVar[float] = 6.5

    def clearly_wrong(self) -> int:
        """How many of the answer's tokens are not the best where that leads by more than bf16 overturns."""
        choices = zip(self.margins, self.argmax, self.answer, strict=True)
        return sum(margin > self.clear_lead and best != taken for margin, best, taken in choices)


class HfReference:
    """A checkpoint in transformers. Raises AssertionError if a tensor is missing or left over."""

    PIECE: ClassVar[int] = 4096  # tokens of a long prompt that KDA takes at a time

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        _use_plain_torch()
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        faults = {kind: found for kind, found in loading.items() if found}
        assert not faults, f"transformers does not load {path} cleanly: {faults}"
        self.model = model.eval().to(device)
        self.path = Path(path)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], keep: int = 0) -> torch.Tensor:
        """Next-token logits [len(ids), vocab] in fp32, or only of the last `keep` positions."""
        tokens = torch.tensor([list(ids)], device=self.model.device)
        return self.model(tokens, use_cache=False, logits_to_keep=keep).logits[0].float().cpu()

    @torch.inference_mode()
    def long_logits(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        """The same of a long prompt, which would not fit; on a CPU.

        Scores are [heads, n, n], decays [n, 64, K] for each head.

        Attention is torch's flash kernel, in the last layer for the `keep` positions alone, as no other layer needs
        the others; KDA takes PIECE tokens at a time and hands on the state.
        """
        from transformers import AttentionInterface
        from transformers.models.kimi_linear import modeling_kimi_linear as modeling

        last = self.model.config.num_hidden_layers - 1

        def attend(module, query, key, value, mask, scaling, **unused):  # all [1, heads, n, size]
            width = value.shape[-1]
            value = torch.nn.functional.pad(value, (0, key.shape[-1] - width))  # the kernel wants equal sizes
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out = torch.zeros_like(query)
            if module.layer_idx == last:
                future = torch.full((keep, len(ids)), float("-inf")).triu(len(ids) - keep + 1)
                out[:, :, -keep:] = flash(query[:, :, -keep:], key, value, attn_mask=future, scale=scaling)[0]
            else:
                out = flash(query, key, value, is_causal=True, scale=scaling)[0]
            return out[..., :width].transpose(1, 2), None

        chunked = modeling.chunk_kimi_delta_attention

        def in_pieces(query, key, value, g, beta, initial_state, output_final_state, **options):
            state, outs = initial_state, []
            for start in range(0, query.shape[1], self.PIECE):
                rows = (x[:, start : start + self.PIECE] for x in (query, key, value))
                gates = {name: x[:, start : start + self.PIECE] for name, x in (("g", g), ("beta", beta))}
                out, state = chunked(*rows, **gates, initial_state=state, output_final_state=True, **options)
                outs.append(out)
            return torch.cat(outs, dim=1), state if output_final_state else None

        AttentionInterface.register("long", attend)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("long")
        modeling.chunk_kimi_delta_attention = in_pieces
        try:
            return self.logits(ids, keep)
        finally:
            self.model.set_attn_implementation(before)
            modeling.chunk_kimi_delta_attention = chunked

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The answer of exactly `tokens` tokens, decoded step by step with a cache; none of them ends it."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        return output[0, len(prompt) :].tolist()

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> Score:
        """One teacher-forced pass over prompt and answer.

        Where every argmax equals the answer's token, by induction greedy decoding gives that answer.
        """
        gaps = [float("inf")]
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda gate, _, out: gaps.append(_router_gap(gate, out[0])))
            for layer in self.model.model.layers
            if hasattr(layer.mlp, "gate")
        ]
        try:
            logits_of = self.long_logits if len(prompt) > self.PIECE else self.logits
            logits = logits_of([*prompt, *answer[:-1]], len(answer))
        finally:
            for hook in hooks:
                hook.remove()
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(5)
        return Score(
            answer=list(answer),
            argmax=logits.argmax(-1).tolist(),
            logprobs=logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist(),
            top=[
                dict(zip(i, p, strict=True)) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
            margins=(best.values[:, 0] - best.values[:, 1]).tolist(),
            router_gap=min(gaps),
        )


def _router_gap(router: Any, router_logits: torch.Tensor) -> float:
    """Smallest distance between the k-th and the (k+1)-th biased score over the rows [T, experts]."""
    if router.top_k == router.num_experts:
        return float("inf")
    scores = (router_logits.sigmoid() + router.e_score_correction_bias).sort(descending=True).values
    return (scores[:, router.top_k - 1] - scores[:, router.top_k]).min().item()


def _use_plain_torch() -> None:
    """Takes transformers' own torch functions where it would call fla or causal_conv1d.

    They are what the specification was checked with, and with fla installed transformers calls its Triton
    kernels on the CPU too, where they cannot run.
    """
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    for name in (
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ):
        setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
