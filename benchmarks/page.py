"""docs/performance.md, and the README's table of speed, from the result files in docs/benchmarks/.

    python -m benchmarks.page

Each figure is taken from a file that the command of a benchmark wrote. What a benchmark missed, and why, is written by
hand, in docs/benchmarks/reasons/. A file is shown whole, one heading lower; of the whole server's rows, which one run
need not have measured together, each is taken from the newest run that has it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
MARKS = ("<!-- speed: python -m benchmarks.page -->", "<!-- end of speed -->")
SERVER_RUNS = ("h200-steady-steps", "h200-real-routers", "h200-new-prefill", "h200")  # newest first

HEAD = """\
# Performance

Written by `python -m benchmarks.page` from the result files in `docs/benchmarks/`, each of which names its command and
its machine. Figures are from the newest run; earlier ones are in the git history of these files.

"times faster" is the other implementation's time divided by ours, or our rate divided by its rate; below 1 ours is
slower. "Floor" is the time to move the bytes at the bandwidth of the data sheet, and nothing else.
"""

NOT_MEASURED = """\
## Not measured

- The real weights of the 48B: whole servers were measured with random weights and evenly used experts.
- Servers of more than two GPUs, and an H100 with the current kernels.
- The longest gap between two tokens with every kernel compiled at the start (`warmup.py`).
- What it costs a prefill on a GPU to keep states for the prefix cache.
"""


@dataclass(frozen=True)
class Row:
    """One figure of `benchmarks.h200`, in the words of the page."""

    name: str  # in the result files
    words: str
    unit: str = "ms"  # or "s", of a file's milliseconds, or "tokens/s"
    in_readme: bool = True


ROWS = {
    "Time per token while decoding": (
        Row("tpot 1 4K: tpot", "decode, 1 sequence, 4K of context"),
        Row("tpot 8 4K: tpot", "decode, 8 sequences, 4K"),
        Row("tpot 32 4K: tpot", "decode, 32 sequences, 4K"),
        Row("tpot 1 128K: tpot", "decode, 1 sequence, 128K"),
        Row("tpot 8 128K: tpot", "decode, 8 sequences, 128K"),
        Row("million: tpot", "decode, 1 sequence, 1M"),
        Row("tpot 1 1M filled: tpot", "decode, 1 sequence, 1M, context not computed", in_readme=False),
    ),
    "The first token of a prompt": (
        Row("tpot 1 4K: ttft", "first token, prompt of 4K", in_readme=False),
        Row("ttft 8K: ttft", "first token, prompt of 8K"),
        Row("tpot 1 128K: ttft", "first token, prompt of 128K", "s"),
        Row("ttft 512K: ttft", "first token, prompt of 512K", "s", in_readme=False),
        Row("million: ttft", "first token, prompt of 1M", "s"),
        Row("million: second ttft", "first token, second question about a cached 1M", "s"),
    ),
    "Requests that arrive at random, 2K tokens in, 256 out, 16 a second": (
        Row("poisson: tokens a second", "random arrivals, throughput", "tokens/s"),
        Row("poisson: p50 tpot", "random arrivals, time per token, p50", in_readme=False),
        Row("poisson: p99 tpot", "random arrivals, time per token, p99"),
        Row("poisson: p50 ttft", "random arrivals, first token, p50", "s", in_readme=False),
    ),
    "The longest gap between two tokens": (
        Row("tpot 1 4K: most gap", "1 sequence, 4K", in_readme=False),
        Row("tpot 1 128K: most gap", "1 sequence, 128K", in_readme=False),
        Row("tpot 8 4K: most gap", "8 sequences, 4K", in_readme=False),
        Row("tpot 32 4K: most gap", "longest gap between two tokens, 32 sequences, 4K"),
        Row("tpot 8 128K: most gap", "8 sequences, 128K", in_readme=False),
    ),
}

# Result files that follow the whole server, in their order; of each, the reasons for what it missed, if it missed any.
SECTIONS = (
    "h200-2gpus",
    "h200-fp8",
    "h200-int4",
    "kernels",
    "latent-decode",
    "expert-tiles",
    "cpu",
    "long-context",
    "cache-blocks",
    "offloading",
    "gateway",
)

Table = dict[str, dict[str, str]]  # first cell of a row -> column -> cell


def tables(text: str) -> list[Table]:
    """Every table of a Markdown text."""
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split(" | ")] for line in block.splitlines()]
        found.append({cells[0]: dict(zip(head, cells, strict=True)) for cells in rows})
    return found


def embedded(name: str) -> str:
    """A result file as a section of the page: headings one lower, links from where the page is."""
    path = RESULTS / f"{name}.md"

    def link(found: re.Match[str]) -> str:
        target = (path.parent / found[1]).resolve().relative_to(PAGE.parent)
        return f"]({target.as_posix()})"

    text = re.sub(r"^(#+ )", r"#\1", path.read_text(), flags=re.MULTILINE)
    return re.sub(r"\]\((?!https?://|#)([^)]+)\)", link, text)


@dataclass(frozen=True)
class Server:
    """The whole server's figures, of all its runs."""

    rows: dict[str, tuple[int, dict[str, str]]]  # name -> number of the run, from 1, and cells
    machines: list[str]

    @classmethod
    def read(cls) -> "Server":
        rows: dict[str, tuple[int, dict[str, str]]] = {}
        machines = []
        for number, name in enumerate(SERVER_RUNS, 1):
            figures, servers = tables((RESULTS / f"{name}.md").read_text())
            machines.append(servers["ours"]["machine"])
            for row, cells in figures.items():
                rows.setdefault(row, (number, cells))
        return cls(rows, machines)

    def row(self, row: Row, columns: tuple[str, ...]) -> list[str]:
        """Words, ours, vLLM's own, times faster, what `columns` name, and the run."""
        run, cells = self.rows[row.name]
        shown = [_cell(row, cells.get(column, "")) for column in ("ours", "vLLM")]
        more = [_cell(row, cells.get(column, "")) for column in columns]
        return [row.words, *shown, faster(row, cells.get("ours", ""), cells.get("vLLM", "")), *more, str(run)]


def _number(cell: str) -> float | None:
    return float(cell) if re.fullmatch(r"[\d.]+", cell) else None


def _cell(row: Row, cell: str) -> str:
    value = _number(cell)
    if value is None:
        return cell or "-"
    if row.unit == "s":
        seconds = value / 1e3
        return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.2f} s"
    if row.unit == "tokens/s":
        return f"{value:,.0f} tokens/s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.2f} ms"


def faster(row: Row, ours: str, other: str) -> str:
    """How many times faster ours is than the other, by their cells; "-" where one is missing."""
    mine, theirs = _number(ours), _number(other)
    if mine is None or theirs is None:
        return "-"
    return f"{mine / theirs if row.unit == 'tokens/s' else theirs / mine:.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def readme_table() -> str:
    """What the README shows, between its marks."""
    server = Server.read()
    rows = [server.row(row, ())[:-1] for group in ROWS.values() for row in group if row.in_readme]
    return markdown(["one NVIDIA H200", "ours", "vLLM's own", "times faster"], rows)


def server_section() -> str:
    server = Server.read()
    columns = ("attention only", "floor", "floor, attention only")
    parts = [
        "## The 48B model on one H200",
        "Made by `python -m benchmarks.h200`: 27 layers with random weights in bfloat16, a router that spreads tokens "
        "evenly over the experts, all servers of a run on the same machine, in runs 1 and 2 each on a GPU of its own. "
        '"vLLM" is its own implementation of this model, "attention only" this model with latent attention in every '
        "layer. Runs, with all flags in their files:",
        "\n".join(
            f"{number}. [{name}.md](benchmarks/{name}.md): {machine}."
            for number, (name, machine) in enumerate(zip(SERVER_RUNS, server.machines, strict=True), 1)
        ),
    ]
    for title, group in ROWS.items():
        head = ["", "ours", "vLLM", "times faster", *columns, "run"]
        rows = [server.row(row, columns) for row in group]
        used = [i for i in range(len(head)) if i < 4 or any(cells[i] != "-" for cells in rows)]
        parts += [f"### {title}", markdown([head[i] for i in used], [[cells[i] for i in used] for cells in rows])]
    run = "h200"  # the one that measured it
    figures = tables((RESULTS / f"{run}.md").read_text())[0]
    column = "ours, bf16 state"
    rows = [
        [row.words, *(_cell(row, figures[row.name][name]) for name in ("ours", column))]
        for row in ROWS["Time per token while decoding"]
        if figures[row.name][column] != "-"
    ]
    head = [f"run {SERVER_RUNS.index(run) + 1}", "ours", column]
    parts += ["### The recurrent state in bfloat16", markdown(head, rows)]
    return "\n\n".join(parts)


def page() -> str:
    """The text of docs/performance.md."""
    parts = [HEAD, server_section(), *_reasons("h200")]
    for name in SECTIONS:
        parts += [embedded(name), *_reasons(name)]
    return "\n\n".join(part.strip() for part in [*parts, NOT_MEASURED]) + "\n"


def _reasons(name: str) -> list[str]:
    return [embedded(f"reasons/{name}")] if (RESULTS / "reasons" / f"{name}.md").exists() else []


def readme() -> str:
    """The text of README.md with the table as it is now."""
    begin, end = MARKS
    before, _, rest = README.read_text().partition(begin)
    return f"{before}{begin}\n\n{readme_table()}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    PAGE.write_text(page())
    README.write_text(readme())


if __name__ == "__main__":
    main()
