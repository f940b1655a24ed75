"""The loss curve of a training run as a table.

python -m examples.demo_model.curve examples/demo_model/log.jsonl
"""

import argparse
import json
from pathlib import Path

LINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
KINDS = ("find", "latest", "several", "absent", "repeat")


def table(log: list[dict]) -> str:
    rows = [
        "| step | seconds | M tokens | longest | loss there | right there: find | latest | several | absent | repeat |"
    ]
    rows.append("| --- " * 10 + "|")
    for number, line in enumerate(log, 1):
        if number not in LINES and number < len(log):
            continue
        longest = max((key for key in line if key.isdigit()), key=int)
        found = line[longest]
        shares = [f"{found[kind]:.1%}" for kind in KINDS]
        cells = [line["step"], f"{line['seconds']:.0f}", f"{line['tokens'] / 1e6:.1f}", f"{int(longest):,}"]
        rows.append(f"| {' | '.join(map(str, [*cells, found['loss'], *shares]))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="A training run's loss curve as a table.")
    parser.add_argument("log", type=Path)
    args = parser.parse_args()
    print(table([json.loads(line) for line in args.log.read_text().splitlines()]))


if __name__ == "__main__":
    main()
