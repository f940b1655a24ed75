"""A bar for the start of `vllm serve`: its phase, as its log says it, and the seconds so far."""

import shutil
from collections.abc import Callable, Iterator

# What vLLM does -> what its log says when that begins. The three processes import it one after another.
PHASES = {
    "imports, API server": "",
    "imports, engine": "non-default args",
    "imports, worker": "Initializing a V1 LLM engine",
    "weights": "Starting to load model",
    "cache and warm-up": "Loading weights took",
    "HTTP": "init engine",
}
WIDTH = 24  # of the bar, in characters


class StartBar:
    """Called with the seconds so far, it shows them with the phase.

    On a terminal that is one line, drawn again each second; elsewhere a line for each phase.

    Args:
        log: what the server has printed so far.
        terminal: whether standard output is one.
    """

    def __init__(self, log: Callable[[], str], terminal: bool) -> None:
        self.log = log
        self.terminal = terminal
        self.begun = {next(iter(PHASES)): 0.0}  # phase -> seconds
        self.shown = ""

    def __call__(self, seconds: float) -> None:
        self._look(seconds)
        phase = list(self.begun)[-1]
        number = list(PHASES).index(phase)
        filled = WIDTH * number // len(PHASES)
        # A line without seconds elsewhere: it would be another line every second.
        line = f"[{'#' * filled:.<{WIDTH}}] {phase}" + (f", {seconds:.0f} s" if self.terminal else "")
        if line != self.shown:
            self.shown = line
            self._draw(line if self.terminal else f"{line}, from second {self.begun[phase]:.0f}")

    def ready(self, seconds: float) -> None:
        """Show the whole bar, and what the time went to."""
        self._look(seconds)
        spent = ", ".join(f"{phase} {lasted:.0f}" for phase, lasted in self._lasted(seconds))
        self._draw(f"[{'#' * WIDTH}] ready, {seconds:.0f} s")
        end = "\n" if self.terminal else ""
        print(f"{end}That is vLLM's own start, in seconds: {spent}", flush=True)

    def _look(self, seconds: float) -> None:
        log = self.log()
        for phase, mark in PHASES.items():
            if mark in log:
                self.begun.setdefault(phase, seconds)

    def _lasted(self, end: float) -> Iterator[tuple[str, float]]:
        ends = [*list(self.begun.values())[1:], end]
        for (phase, begun), until in zip(self.begun.items(), ends, strict=True):
            yield phase, until - begun

    def _draw(self, line: str) -> None:
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[: columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)
