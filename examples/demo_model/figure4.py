"""The three synthetic tasks of figure 4 of the tech report (arXiv 2510.26692) at length 1,024: does our KDA learn them?

    python -m examples.demo_model.figure4 --task palindrome --out DIR

Two layers of KDA with two heads of 128 and an MLP each, at most 20,000 steps, as there; sizes of alphabets and the
number of pairs and stacks are ours. A token is right or wrong by argmax, on rows never seen before.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo_model.network import DeltaAttention, Mlp, Norm, linear

LENGTH = 1024
VOCAB = 1024
HIDDEN, HEADS, DIM, LAYERS = 256, 2, 128, 2
Rows = tuple[Tensor, Tensor]  # tokens [B, T], and where their successor counts [B, T]


def palindrome(batch: int, device: str, alphabet: int = 64) -> Rows:
    """511 letters, a mark, the letters backwards."""
    half = LENGTH // 2 - 1
    letters = torch.randint(2, 2 + alphabet, (batch, half), device=device)
    mark = torch.ones(batch, 1, dtype=torch.long, device=device)
    ids = torch.cat([letters, mark, letters.flip(1), mark], 1)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, half : 2 * half] = True
    return ids, counts


def recall(batch: int, device: str, pairs: int = 128) -> Rows:
    """128 pairs of key and value, then keys in any order, each followed by its value (MQAR)."""
    keys = torch.rand(batch, VOCAB // 2, device=device).argsort(1)[:, :pairs]
    values = torch.randint(VOCAB // 2, VOCAB, (batch, pairs), device=device)
    asked = torch.randint(pairs, (batch, LENGTH // 2 - pairs), device=device)
    told = torch.stack([keys, values], 2).flatten(1)
    ids = torch.cat([told, torch.stack([keys.gather(1, asked), values.gather(1, asked)], 2).flatten(1)], 1)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, 2 * pairs :: 2] = True
    return ids, counts


def stack(batch: int, device: str, stacks: int = 64, letters: int = 64) -> Rows:
    """Push, which stack, what; or pop, which stack, and then what must come off it. Never from an empty one."""
    steps = LENGTH // 3
    which = torch.randint(stacks, (batch, steps), device=device)
    what = torch.randint(letters, (batch, steps), device=device)
    push = torch.rand(batch, steps, device=device) < 0.5
    held = torch.zeros(batch, stacks, steps + 1, dtype=torch.long, device=device)
    height = torch.zeros(batch, stacks, dtype=torch.long, device=device)
    row = torch.arange(batch, device=device)
    for step in range(steps):
        at = which[:, step]
        push[:, step] |= height[row, at] == 0
        top = held[row, at, (height[row, at] - 1).clamp(min=0)]
        what[:, step] = torch.where(push[:, step], what[:, step], top)
        held[row, at, height[row, at]] = torch.where(push[:, step], what[:, step], held[row, at, height[row, at]])
        height[row, at] += torch.where(push[:, step], 1, -1)
    ids = torch.stack([push.long(), 2 + which, 2 + stacks + what], 2).flatten(1)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, 1::3] = ~push
    return ids, counts


TASKS: dict[str, Callable[[int, str], Rows]] = {"palindrome": palindrome, "recall": recall, "stack": stack}


def batches(task: str, batch: int, device: str, pool: int = 32) -> Iterator[Rows]:
    """Rows made `pool` batches at a time: `stack` loops over its steps, which takes no longer for many rows."""
    while True:
        ids, counts = TASKS[task](pool * batch, device)
        yield from zip(ids.split(batch), counts.split(batch), strict=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(HIDDEN), Norm(HIDDEN)])
        self.attention, self.mlp = DeltaAttention(HIDDEN, HEADS, DIM), Mlp(HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def train(task: str, out: Path, minutes: float, steps: int, batch: int, peak: float, seed: int = 0) -> None:
    """Train until the time or the steps are over, or 200 steps in a row have no error; one line of log a 200 steps."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), *(Block() for _ in range(LAYERS)), Norm(HIDDEN))
    model.append(linear(HIDDEN, VOCAB)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1)
    begun, errors, tokens = time.monotonic(), torch.zeros((), device=device), torch.zeros((), device=device)
    rows = batches(task, batch, device)
    for step in range(1, steps + 1):
        ids, counts = next(rows)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1])[counts[:, :-1]].float()
        wanted = ids[:, 1:][counts[:, :-1]]
        loss = F.cross_entropy(logits, wanted)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(step / 500, 1.0, max((steps - step) / (0.5 * steps), 0.01))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors += (logits.argmax(-1) != wanted).sum()
        tokens += wanted.numel()
        if step % 200 == 0:
            seconds = time.monotonic() - begun
            share = 1 - (errors / tokens).item()
            line = {"task": task, "step": step, "seconds": round(seconds), "loss": loss.item(), "right": share}
            with (out / f"{task}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            if share == 1 or seconds > 60 * minutes:
                return
            errors, tokens = errors * 0, tokens * 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Train KDA on a synthetic task.")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.task, args.out, args.minutes, args.steps, args.batch, args.rate)


if __name__ == "__main__":
    main()
