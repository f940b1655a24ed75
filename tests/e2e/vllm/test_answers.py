"""What the server answers to one prompt at a time is what transformers answers, in fp32."""

import math

import pytest
import torch

from kimi_demo.reference import HfReference
from tests.support.completions import Completions
from tests.support.prompts import LOGPROB_TOLERANCE, MARGIN, ROUTER_GAP, Case, Stream, check, is_well_posed


def test_the_cases_are_what_they_should_be(cases: list[Case]):
    lengths = [len(case.prompt) for case in cases]
    assert len(cases) >= 24
    assert (min(lengths), max(lengths)) == (1, 2000)
    assert max(len(case.score.answer) for case in cases) == 300
    for case in cases:
        assert case.score.agrees and is_well_posed(case.score)
        # An answer that repeats itself would hide a wrong state.
        assert len(set(case.score.answer)) > len(case.score.answer) / 4


def test_cases_decoded_step_by_step_are_the_same(cases: list[Case], reference: HfReference):
    for case in [case for case in cases if len(case.prompt) in (3, 65)]:
        assert reference.greedy(*case.asked) == case.score.answer


def test_the_bounds_are_above_the_noise(reference: HfReference, vocab: int, monkeypatch: pytest.MonkeyPatch):
    """The noise: what changes in the reference when it computes the same recurrence in its other form."""
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    prompt = Stream(vocab, seed=2).prompt(200)
    chunked, gaps = _logprobs_and_gaps(reference, prompt)
    recurrent = modeling.recurrent_kimi_delta_attention
    monkeypatch.setattr(modeling, "chunk_kimi_delta_attention", lambda *args, **kw: recurrent(*args, **kw))
    stepped, other_gaps = _logprobs_and_gaps(reference, prompt)
    best = chunked.topk(2).indices
    one, other = chunked.gather(1, best), stepped.gather(1, best)
    noises = {
        LOGPROB_TOLERANCE: (one - other)[:, 0],
        MARGIN: (one - other).diff(),
        ROUTER_GAP: gaps - other_gaps,
    }
    for bound, noise in noises.items():
        size = noise.abs().flatten()
        assert 0 < size.max() < bound
        assert 4 * size.quantile(0.99) < bound


@torch.inference_mode()
def _logprobs_and_gaps(reference: HfReference, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs [T, vocab] and, for every routed layer, last chosen minus first refused score [layers, T]."""
    gaps: list[torch.Tensor] = []

    def keep(router, _, output):
        best = (output[0].sigmoid() + router.e_score_correction_bias).topk(router.top_k + 1).values
        gaps.append(best[:, -2] - best[:, -1])

    routers = [layer.mlp.gate for layer in reference.model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        logprobs = reference.logits(prompt).log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    return logprobs, torch.stack(gaps)


def test_alone(cases: list[Case], server: Completions):
    answers = server.one_by_one(case.asked for case in cases)
    check(cases, answers)


def test_logprobs_of_the_alternatives(cases: list[Case], server: Completions):
    """Not only the chosen token's: the five most likely of every position, compared by token id."""
    for case in [case for case in cases if len(case.prompt) in (1, 64, 1025)]:
        body = server.body(*case.asked) | {"logprobs": 5, "return_tokens_as_token_ids": True}
        served = server.post(body)["choices"][0]["logprobs"]["top_logprobs"]
        for ours, theirs in zip(served, case.score.top, strict=True):
            found = {int(name.removeprefix("token_id:")): logprob for name, logprob in ours.items()}
            # Near ties may order the fifth and the sixth differently.
            common = found.keys() & theirs.keys()
            assert len(common) >= 4
            assert all(math.isclose(found[i], theirs[i], abs_tol=LOGPROB_TOLERANCE) for i in common)
