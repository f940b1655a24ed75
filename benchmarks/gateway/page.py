"""The page with the figures of all runs."""

import os
import statistics
from datetime import date
from typing import Any

from benchmarks.common import processor, versions
from benchmarks.gateway.peers import TITLES
from benchmarks.gateway.questions import ANSWER, FLAGS, QUESTIONS, RATE, SHORT, WAYS
from benchmarks.load import percentile


def page(results: dict[str, Any], command: str, note: str) -> str:
    lines = [
        "# Short questions beside a very long prompt",
        "",
        f"    {command}",
        "",
        f"{processor()}, {os.cpu_count()} cores, {date.today()}, "
        f"{versions('vllm')}. The demo checkpoint, one thread a replica, `{' '.join(FLAGS)}`. A question has "
        f"{SHORT} tokens and an answer of {ANSWER}; {QUESTIONS} come at random times, {RATE:g} a second, while the "
        "long prompts are read. Seconds to the first token of a question, p50 / p95 of each run.",
        *([note] if note else []),
        "",
        "| long prompts | way | runs | p50 / p95 of each run | first long prompt done after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, way in WAYS.items():
        runs = results.get(name)
        if not runs:
            continue
        cells = [f"{percentile(r['questions'], 0.5):.3f} / {percentile(r['questions'], 0.95):.3f}" for r in runs]
        done = [min(r["long"]) for r in runs if r["long"]]
        last = f"{statistics.median(done):.0f} s" if done else "after the last question"
        lines.append(f"| {way.title} | {way.name} | {len(runs)} | {', '.join(cells)} | {last} |")
    if measured := results.get("overhead"):
        titles = {"bare": "straight", "gateway": "gateway", **TITLES}
        columns = [name for name in titles if name in measured]
        lines += [
            "",
            "In front of a stand-in that answers at once; milliseconds, p50 / p99:",
            "",
            f"| | {' | '.join(titles[name] for name in columns)} |",
            "| --- |" + " --- |" * len(columns),
        ]
        for what, title in (("request", "a whole request"), ("event", "a streamed token, from sent to received")):
            figures = []
            for name in columns:
                p50, p99 = (f"{1e3 * percentile(measured[name][what], share):.2f}" for share in (0.5, 0.99))
                figures.append(f"{p50} / {p99}")
            lines.append(f"| {title} ({len(measured['bare'][what])}) | {' | '.join(figures)} |")
    if measured := results.get("bodies"):
        lines += [
            "",
            "A stream beside large bodies that come at once, in front of the same stand-in; senders share the machine:",
            "",
            "| bodies | of | longest way of a streamed token | before they came | last body answered after |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in measured:
            size = f"{row['count']} x {row['size']} MiB"
            ways = " | ".join(f"{1e3 * row[name]:.0f} ms" for name in ("way", "alone"))
            lines.append(f"| {size} | {row['kind']} | {ways} | {row['answered']:.1f} s |")
    return "\n".join(lines) + "\n"
