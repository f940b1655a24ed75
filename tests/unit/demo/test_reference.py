"""The HF reference's own account of an answer."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kimi_demo.reference import HfReference
from tests.support.prompts import MARGIN, ROUTER_GAP, is_well_posed


def test_score_is_what_greedy_decoding_does(reference: HfReference, ids: list[int]):
    prompt = ids[:40]
    answer = reference.greedy(prompt, 20)
    score = reference.score(prompt, answer)
    assert score.agrees and score.argmax == answer
    assert [max(top, key=lambda token: top[token]) for top in score.top] == answer
    assert score.logprobs == [max(top.values()) for top in score.top]
    logprobs = reference.logits([*prompt, *answer])[39:-1].log_softmax(-1)
    assert score.logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)
    first, second = logprobs.topk(2).values.unbind(-1)
    assert score.margin == pytest.approx((first - second).min().item(), abs=1e-4)

    wrong = [*answer[:10], (answer[10] + 1) % 1024, *answer[11:]]
    assert reference.score(prompt, wrong).argmax[:11] == answer[:11]
    assert not reference.score(prompt, wrong).agrees


def test_end_tokens_do_not_end_greedy(demo_model: Path):
    reference = HfReference(demo_model)
    end = reference.model.generation_config.eos_token_id[0]
    raised = torch.zeros(1024).index_fill(0, torch.tensor(end), 1000.0)
    reference.model.lm_head.register_forward_hook(lambda _, __, logits: logits + raised)
    assert reference.greedy([1, 2, 3], 5) == [end] * 5


def test_ties_are_not_well_posed(reference: HfReference, ids: list[int]):
    prompt = ids[:16]
    answer = reference.greedy(prompt, 8)
    score = reference.score(prompt, answer)
    assert is_well_posed(score)
    assert not is_well_posed(replace(score, margins=[*score.margins, MARGIN]))
    assert not is_well_posed(replace(score, router_gap=ROUTER_GAP))

    tied = copy.copy(reference)
    tied.model = copy.deepcopy(reference.model)
    other = next(token for token in range(1000) if token not in answer)
    with torch.no_grad():
        tied.model.lm_head.weight[other] = tied.model.lm_head.weight[answer[3]]
        gate = tied.model.model.layers[2].mlp.gate
        gate.weight[1], gate.e_score_correction_bias[:] = gate.weight[0], 0
    assert tied.score(prompt, answer).margin < 1e-5
    with torch.no_grad():
        gate.e_score_correction_bias[:2] = 0.3  # two equal experts that some row ranks second and third
    assert tied.score(prompt, answer).router_gap < 1e-6
