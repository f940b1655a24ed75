"""The sum over ranks with its norm: ranks that are processes in Triton's interpreter, and streams of GPUs there."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_kernels import reference

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
EPS, MOST = 1e-5, 8
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
inside = pytest.mark.skipif(not INSIDE, reason="see tests/e2e/kernels")

Rows = list[list[Tensor]]  # of a call, of a rank


def processes(parts: Rows, residual: Tensor, weight: Tensor, begun: int) -> list[list[tuple[Tensor, Tensor]]]:
    """What each call gives on each rank, each a process; their memory is the others', too."""
    from decode_kernels.cuda import Workspace, all_reduce_add_norm

    ranks = len(parts[0])
    size = Workspace.buffer_bytes(ranks, MOST, residual.shape[1] * residual.element_size()) // 8
    buffers = [torch.zeros(size, dtype=torch.int64).share_memory_() for _ in range(ranks)]
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def run(rank: int) -> None:
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
        workspace = Workspace(addresses, torch.full((MOST,), begun, dtype=torch.int32), rank)
        each = [all_reduce_add_norm(call[rank], residual[: len(call[rank])], weight, EPS, workspace) for call in parts]
        answers.put((rank, [(y.numpy(), total.numpy()) for y, total in each]))

    started = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=300) for _ in started)
    for process in started:
        process.join()
    return [[tuple(map(torch.from_numpy, found[rank][call])) for rank in range(ranks)] for call in range(len(parts))]


def streams(parts: Rows, residual: Tensor, weight: Tensor, begun: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The same on GPUs, each rank a stream; of one GPU if there is no other."""
    from decode_kernels.cuda import Workspace, all_reduce_add_norm

    ranks = len(parts[0])
    devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(ranks)]
    size = Workspace.buffer_bytes(ranks, MOST, residual.shape[1] * residual.element_size()) // 8
    buffers = [torch.zeros(size, dtype=torch.int64, device=device) for device in devices]
    for buffer in buffers:  # torch lets each reach the others with the first copy
        for device in devices:
            buffer[:1].to(device)
    workspaces = [
        Workspace(
            torch.tensor([buffer.data_ptr() for buffer in buffers], device=device),
            torch.full((MOST,), begun, dtype=torch.int32, device=device),
            rank,
        )
        for rank, device in enumerate(devices)
    ]
    own = [[part.to(device) for part, device in zip(call, devices, strict=True)] for call in parts]
    same = [(residual.to(device), weight.to(device)) for device in devices]
    queues = [torch.cuda.Stream(device) for device in devices]
    for device in devices:
        torch.cuda.synchronize(device)
    found = []
    for call in own:
        each = []
        for rank, queue in enumerate(queues):
            with torch.cuda.device(devices[rank]), torch.cuda.stream(queue):
                x, (more, norm) = call[rank], same[rank]
                each.append(all_reduce_add_norm(x, more[: len(x)], norm, EPS, workspaces[rank]))
        found.append(each)
    for queue in queues:
        queue.synchronize()
    return [[(y.cpu(), total.cpu()) for y, total in each] for each in found]


@pytest.fixture(
    params=[
        pytest.param((processes, torch.float32), marks=inside, id="interpreter"),
        pytest.param((streams, torch.bfloat16), marks=GPU, id="gpu"),
    ]
)
def where(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], torch.dtype]:
    pytest.importorskip("triton")
    return request.param


def close(found: Tensor, wanted: Tensor) -> None:
    bound = 1e-6 if found.dtype == torch.float32 else 4e-3
    assert (found.double() - wanted.double()).norm() <= bound * wanted.double().norm()


# 300: no power of two; 144: less than a program's threads.
@pytest.mark.parametrize(("ranks", "K"), [(2, 300), (3, 144), (4, 64)])
def test_every_rank_has_the_sum_and_its_norm(ranks: int, K: int, where: Any) -> None:
    """Calls of other numbers of tokens, one after the other; across the largest number of a call."""
    run, dtype = where
    draw = torch.Generator().manual_seed(ranks)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    parts = [[random(tokens, K) for _ in range(ranks)] for tokens in (1, 2, 1, MOST, 3, 1)]
    residual, weight = random(MOST, K), random(K)
    for begun in (0, 2**31 - 3):
        for call, found in zip(parts, run(parts, residual, weight, begun), strict=True):
            wanted = reference.all_reduce_add_norm(call, residual[: len(call[0])], weight, EPS)
            for own in found:
                for one, other, right in zip(own, found[0], wanted, strict=True):
                    close(one, right)
                    assert torch.equal(one, other), "ranks differ"


def test_what_is_no_number_stays_with_its_token(where: Any) -> None:
    run, dtype = where
    parts = [[torch.ones(3, 64, dtype=dtype) for _ in range(2)]]
    parts[0][0][1, 5], parts[0][1][2, 7] = float("nan"), float("inf")
    [[(y, total), (other, _)]] = run(parts, torch.zeros(3, 64, dtype=dtype), torch.ones(64, dtype=dtype), 0)
    assert y[0].isfinite().all() and (total[0] == 2).all()
    assert total[1].isnan().sum() == 1 and total[2].isinf().sum() == 1
    assert torch.equal(y.isfinite(), other.isfinite())


@inside
def test_more_tokens_than_there_is_room_for() -> None:
    from decode_kernels.cuda import Workspace, all_reduce_add_norm

    workspace = Workspace(torch.zeros(2, dtype=torch.int64), torch.zeros(MOST, dtype=torch.int32), 0)
    x = torch.zeros(MOST + 1, 64)
    with pytest.raises(ValueError, match=r"9 tokens; the workspace has room for 8"):
        all_reduce_add_norm(x, x, x[0], EPS, workspace)
