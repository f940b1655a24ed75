"""What stands for Triton's kernels on a CPU while drafts are verified, each against a plain statement of its result."""

from collections.abc import Iterator

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.sample.ops import topk_topp_sampler

from vllm_kimi_linear.patches import all as patches
from vllm_kimi_linear.patches.patch import serve_ours

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU runs the kernels themselves")

VOCAB = 30
DRAFTED = [[0], [1], [3], [0, 0, 0], [3, 0, 2, 0, 1], [0, 2], [2, 0]]  # tokens, of each request of a step


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    current_platform.import_kernels()
    patches.apply()
    serve_ours()


def ends(drafted: list[int]) -> torch.Tensor:
    return torch.tensor(drafted).cumsum(0).int()


def rows(drafted: list[int]) -> Iterator[tuple[int, range]]:
    """Each request with the places of its drafted tokens."""
    start = 0
    for request, count in enumerate(drafted):
        yield request, range(start, start + count)
        start += count


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize(
    ("values", "replaced"),
    [
        (torch.tensor([0.0, 0.7, 1.0, 1e-3, 2.5]), {0.0: 1.0}),  # temperature
        (torch.tensor([0.9, 0.1, 1.0, 0.25, 0.5]), {}),  # top_p
        (torch.tensor([50, 1, VOCAB, 7, 2], dtype=torch.int32), {}),  # top_k
        (torch.tensor([5, 0, 1, 2, 3]), {}),
    ],
)
def test_each_drafted_token_gets_its_requests_value(drafted: list[int], values: torch.Tensor, replaced: dict):
    values = values[: len(drafted)]
    expected = [
        replaced.get(value, value) for value, count in zip(values.tolist(), drafted, strict=True) for _ in range(count)
    ]
    output = values.new_full((sum(drafted),), 9)
    replace = next(iter(replaced.items()), (0, 0))
    cpu_triton_utils._expand_kernel_impl(output, values, ends(drafted), *replace)
    assert output.tolist() == expected


@pytest.mark.parametrize("k", [[], [3], [VOCAB], [1, VOCAB, 5], [VOCAB, VOCAB]])
@pytest.mark.parametrize("with_p", [False, True])
def test_top_k_of_so_many_rows(k: list[int], with_p: bool):
    logits = torch.randn(len(k), VOCAB, generator=torch.Generator().manual_seed(0))
    p = torch.ones(len(k)) if with_p else None
    found = topk_topp_sampler.apply_top_k_top_p(logits.clone(), torch.tensor(k, dtype=torch.int32), p)
    assert found.shape == logits.shape
    for row, most, kept in zip(logits, k, found, strict=True):
        least = row.sort(descending=True).values[most - 1]
        assert torch.equal(kept, row.masked_fill(row < least, -torch.inf))


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("greedy", [None, "all", "none", "some"])
def test_greedy_requests_keep_drafts_up_to_the_first_wrong_one(drafted: list[int], greedy: str | None):
    random = torch.Generator().manual_seed(len(drafted))
    requests, tokens = len(drafted), sum(drafted)
    drafts = torch.randint(VOCAB, (tokens,), generator=random, dtype=torch.int32)
    best = torch.where(torch.rand(tokens, generator=random) < 0.6, drafts.long(), torch.tensor(3))
    bonus = torch.randint(VOCAB, (requests, 1), generator=random, dtype=torch.int32)
    is_greedy = [greedy in (None, "all") or (greedy == "some" and request % 2 == 0) for request in range(requests)]
    expected = torch.full((requests, max(drafted) + 1), -1, dtype=torch.int32)
    for request, places in rows(drafted):
        answer = [int(best[place]) for place in places]
        right = [int(drafts[place]) == int(best[place]) for place in places]
        answer = answer[: right.index(False) + 1] if False in right else [*answer, int(bonus[request])]
        if is_greedy[request]:
            expected[request, : len(answer)] = torch.tensor(answer)
    output = torch.full_like(expected, -1)
    mask = None if greedy is None else torch.tensor(is_greedy)
    cpu_triton_utils._rejection_greedy_sample_kernel_impl(
        output, ends(drafted), drafts, best, bonus, mask, max(drafted)
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("some_greedy", [False, True])
@pytest.mark.parametrize("placeholders", [False, True])
def test_random_requests_keep_drafts_that_are_likely_enough(drafted: list[int], some_greedy: bool, placeholders: bool):
    random = torch.Generator().manual_seed(sum(drafted))
    requests, tokens = len(drafted), sum(drafted)
    drafts, recovered = torch.randint(VOCAB, (2, tokens), generator=random, dtype=torch.int32)
    likely = torch.rand(tokens, generator=random)  # the probability of each draft; 0 and 1 among them
    likely[::4], likely[1::4] = 0, 1
    probs = torch.zeros(tokens, VOCAB).scatter(1, drafts[:, None].long(), likely[:, None])
    uniform = torch.rand(tokens, generator=random, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    if placeholders:  # whose probability nobody asked for: here that of the last word, a row before
        drafts[:] = -1
        probs[:, -1], likely[:] = 1, 0
    bonus = torch.randint(VOCAB, (requests, 1), generator=random, dtype=torch.int32)
    is_greedy = torch.arange(requests) % 2 == (0 if some_greedy else 2)
    expected = torch.full((requests, max(drafted) + 1), -1, dtype=torch.int32)
    for request, places in rows(drafted):
        answer = []
        for place in places:
            kept = float(likely[place]) >= float(uniform[place])
            answer.append(int(drafts[place] if kept else recovered[place]))
            if not kept:
                break
        else:
            answer.append(int(bonus[request]))
        if not is_greedy[request]:
            expected[request, : len(answer)] = torch.tensor(answer)
    output = torch.full_like(expected, -1)
    cpu_triton_utils._rejection_random_sample_kernel_impl(
        output,
        ends(drafted),
        drafts,
        None,
        probs,
        bonus,
        recovered,
        uniform,
        is_greedy,
        max(drafted),
        VOCAB,
        NO_DRAFT_PROBS=True,
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("drafted", DRAFTED)
def test_a_refused_draft_is_replaced_by_another_token(drafted: list[int]):
    random = torch.Generator().manual_seed(sum(drafted))
    requests, tokens = len(drafted), sum(drafted)
    drafts = torch.randint(VOCAB, (tokens,), generator=random, dtype=torch.int32)
    probs = torch.randn(tokens, VOCAB, generator=random).softmax(-1)
    inverse = torch.empty(requests, VOCAB).exponential_(generator=random).reciprocal()
    expected = [
        max((v for v in range(VOCAB) if v != drafts[place]), key=lambda v: float(probs[place, v] * inverse[request, v]))
        for request, places in rows(drafted)
        for place in places
    ]
    output = torch.full_like(drafts, -1)
    cpu_triton_utils._sample_recovered_tokens_kernel_impl(
        output, ends(drafted), drafts, None, probs, inverse, VOCAB, NO_DRAFT_PROBS=True
    )
    assert output.tolist() == expected
