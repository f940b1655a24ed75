"""Train the small model on one GPU.

    python -m examples.demo_model.train --out DIR --minutes 12

Lengths grow as the model masters them. Learning rate and end go by the clock, so that it ends in time on any card; the
data by --seed. Run again with the same --out it goes on where it was. DIR/checkpoint is the model, DIR/log.jsonl the
loss curve.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.demo_model import words
from examples.demo_model.batches import Batch, Maker
from examples.demo_model.config import config
from examples.demo_model.conversations import KINDS
from examples.demo_model.network import KimiLinear
from vllm_kimi_linear.config.model import ModelSizes

LENGTHS = (192, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MASTERED = 0.8  # of the questions at the greatest length so far
PEAK_RATE, WARM_UP, COOL_DOWN = 2e-3, 0.02, 0.4  # shares of the time
BALANCE = 1e-3  # how far a step moves a router's bias


@dataclass
class Progress:
    """How far training is; what a resumed run needs besides the tensors."""

    seconds: float = 0.0
    step: int = 0
    tokens: int = 0
    level: int = 0
    right: dict[int, float] = field(default_factory=dict)  # length -> running share of questions answered

    def note(self, length: int, share: float) -> None:
        before = self.right.get(length, 0.0)
        self.right[length] = before + 0.05 * (share - before)
        if self.level + 1 < len(LENGTHS) and self.right.get(LENGTHS[self.level], 0) > MASTERED:
            self.level += 1

    def length(self, rng: random.Random) -> int:
        """The greatest so far three times of five, else one of the smaller."""
        level = self.level if rng.random() < 0.6 else rng.randrange(self.level + 1)
        return LENGTHS[level]


def rate(done: float) -> float:
    """The learning rate after this share of the time: warm-up, plateau, linear to a hundredth."""
    if done < WARM_UP:
        return PEAK_RATE * (0.05 + 0.95 * done / WARM_UP)
    return PEAK_RATE * max(min(1.0, (1 - done) / COOL_DOWN), 0.01)


def requests(progress: Progress, tokens: int, seed: int) -> Iterator[tuple[int, int, int]]:
    rng = random.Random(seed + progress.step)
    while True:
        length = progress.length(rng)
        yield length, max(tokens // length, 1), rng.getrandbits(60)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        self.model = KimiLinear(ModelSizes.from_config(config())).to(self.device)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=self.device == "cuda")
        self.progress = Progress()
        self.state = args.out / "state.pt"
        if self.state.exists():
            saved = torch.load(self.state, map_location=self.device, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress = saved["progress"]

    def run(self) -> None:
        args, progress = self.args, self.progress
        maker = Maker(args.workers, ahead=2 * args.workers)
        saved, last = time.monotonic(), 0.0
        seen: list[tuple[int, list[float]]] = []
        pending: tuple[int, torch.Tensor] | None = None  # read one step late, so that the GPU need not be waited for
        for batch in maker.stream(requests(progress, args.tokens, args.seed)):
            done = progress.seconds / (60 * args.minutes)
            if done >= 1 or (args.steps and progress.step >= args.steps):
                break
            figures = self.step(batch, rate(done))
            if pending:
                seen.append((pending[0], pending[1].tolist()))
                progress.note(pending[0], seen[-1][1][2])
            pending = batch.length, figures
            now = time.monotonic()
            progress.seconds += now - last if last else 0.0  # the first step of a run compiles
            last = now
            if progress.step % args.every == 0:
                self.report(seen)
                seen = []
            if time.monotonic() - saved > args.save_seconds:
                self.save()
                saved = time.monotonic()
        maker.pool.shutdown(cancel_futures=True)
        self.save()

    def step(self, batch: Batch, rate: float) -> torch.Tensor:
        """One update; returns loss, gradient norm, share of questions answered, then questions and answers by kind."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids, at, question, kinds = (
            torch.from_numpy(x).to(self.device, non_blocking=True)
            for x in (batch.ids, batch.predicted_at, batch.question, batch.kinds)
        )
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            rows = self.model(ids).flatten(0, 1)[at]
            logits = self.model.lm_head(rows).float()
        wanted = ids.flatten()[at + 1]
        loss = F.cross_entropy(logits, wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for router in self.model.routers():
            router.e_score_correction_bias += BALANCE * (router.load.mean() - router.load).sign()
        right = (count(question, (logits.argmax(-1) != wanted).float(), len(kinds)) == 0).float()
        asked, answered = (count(kinds, of, len(KINDS)) for of in (torch.ones_like(right), right))
        self.progress.step += 1
        self.progress.tokens += batch.ids.size
        return torch.cat([torch.stack([loss.detach(), norm, right.mean()]), asked, answered])

    def report(self, seen: list[tuple[int, list[float]]]) -> None:
        """One line of the log: loss, and the share of questions answered by kind, at each length of these steps."""
        progress, count = self.progress, len(KINDS)
        line: dict[str, Any] = {"step": progress.step, "seconds": round(progress.seconds, 1), "tokens": progress.tokens}
        for length in sorted({length for length, _ in seen}):
            figures = [figures for of, figures in seen if of == length]
            total = [sum(column) for column in zip(*figures, strict=True)]
            asked, answered = total[3 : 3 + count], total[3 + count :]
            shares = {k: round(b / a, 3) for k, a, b in zip(KINDS, asked, answered, strict=True) if a}
            line[str(length)] = {"loss": round(total[0] / len(figures), 4), **shares}
        with (self.args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def save(self) -> None:
        """The state to go on from, then the checkpoint; each written whole or not at all."""
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": self.progress}
        new = self.state.with_suffix(".new")
        torch.save(saved, new)
        os.replace(new, self.state)
        write_checkpoint(self.model, self.args.out / "checkpoint")


def count(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """[size]: the sum of the values of each index."""
    return torch.zeros(size, device=values.device).index_add_(0, index, values)


def write_checkpoint(model: KimiLinear, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    new = folder / "model.new"
    save_file(model.checkpoint(), new, metadata={"format": "pt"})
    new.chmod(0o644)
    os.replace(new, folder / "model.safetensors")
    words.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--steps", type=int, help="stop after that many, whatever the time")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--save-seconds", type=float, default=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
