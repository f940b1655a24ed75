"""Write the log and the four questions that `make demo` asks.

python -m examples.demo_model.sample --out examples/demo_model/sample.json
"""

import argparse
import json
import random
from pathlib import Path

from examples.demo_model.conversations import Asker, make_log

TOKENS = 8000
ASKED = ("find", "latest", "several", "absent")


def sample(seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    log = make_log(rng, TOKENS)
    asker = Asker(log, rng)
    questions = [asker.ask(kind) for kind in ASKED]
    return {"log": log.text, "questions": [{"question": each.text, "answer": each.answer} for each in questions]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a log and questions about it.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=16)
    args = parser.parse_args()
    args.out.write_text(json.dumps(sample(args.seed), indent=1) + "\n")


if __name__ == "__main__":
    main()
