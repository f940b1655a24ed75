"""What is said where a request does not fit: by how much, what would do, and what fits instead."""

from collections.abc import Sequence
from dataclasses import replace

from kimi_server.planner.plan import Choice, best_spread
from kimi_server.planner.remedies import Remedy, phrases, remedies
from kimi_server.planner.sizes import documents, flag, gib, tokens
from kimi_server.planner.stored import GUIDE
from vllm_kimi_linear.cache.layout import longest_context

NOTHING = "no machine of up to 8 known GPUs holds"
LEAST_CONTEXT = 4 << 10  # tokens that are suggested


def sentence(choice: Choice) -> str:
    """All of it in one, for an error."""
    do = either([*changes(choice), *phrases(remedies(choice), choice.machine)])
    return f"{head(choice)}: {shortage(choice)}; {f'choose {do}' if do else f'{NOTHING} that'}"


def answer(choice: Choice, found: Sequence[Remedy], shorter: Choice | None = None) -> str:
    """The first line. `shorter` is what fits instead, where no length was asked for."""
    asked, knobs = choice.request, changes(choice)
    who, what = "It" if asked.concurrency == 1 else "They", "that"
    lines = [f"No: {head(choice)}."]
    if shorter:
        context = shorter.request.context
        held = documents(shorter.best.sequences(context), context)
        lines.append(f"Yes: {held} at once, with --context {flag(context)}.")
        who = what = documents(asked.concurrency, asked.context)
        knobs = [knob for knob in knobs if not knob.startswith("--context")]
    need = "needs" if asked.concurrency == 1 else "need"
    do = either(phrases(found, choice.machine))
    lines.append(f"{who} {need} {do}." if do else f"{NOTHING[0].upper()}{NOTHING[1:]} {what}.")
    if any(each.stored for each in found):
        lines.append(f"{GUIDE} says where to get such a checkpoint.")
    if knobs:
        lines.append(f"Here {either(knobs)} fits.")
    return " ".join(lines)


def shorter(choice: Choice) -> Choice | None:
    """The same request for the longest power of two at which it fits; None where that is less than 4K."""
    context = 1 << (choice.request.context - 1).bit_length() - 1
    while context >= LEAST_CONTEXT:
        # Layouts are the same for every length.
        if (found := replace(choice, request=replace(choice.request, context=context))).fits:
            return found
        context //= 2
    return None


def head(choice: Choice) -> str:
    """1 document of 1M does not fit on 2 x RTX-4090."""
    request, machine = choice.request, choice.machine
    do = "does" if request.concurrency == 1 else "do"
    where = f"{machine.count} x {machine.short}"
    if machine.device == "cpu":
        where = f"a CPU that may use {gib(machine.usable)}"
        if machine.count > 1:
            where = f"{machine.count} ranks of a CPU that may use {gib(machine.usable)} each"
        where += machine.why
    fitting = choice.best.sequences(request.context)
    rest = f", {fitting:,} {'does' if fitting == 1 else 'do'}" if fitting else ""
    return f"{documents(request.concurrency, request.context)} {do} not fit on {where}{rest}"


def shortage(choice: Choice) -> str:
    """How many bytes a rank of the best layout lacks."""
    request, held, who = choice.request, choice.best.forecast, f"each rank of {choice.best.describe()}"
    short = gib(held.shortage(choice.per_server, request.context))
    if held.cache <= 0:
        before = gib(held.weights + held.activations + held.runtime)
        return (
            f"{who} needs {before} for weights and activations alone and may use {gib(held.memory)}; with the cache "
            f"{short} are missing"
        )
    needed = gib(held.cache_bytes(choice.per_server, request.context))
    return f"{who} needs {needed} of cache and has {gib(held.cache)}; {short} are missing"


def changes(choice: Choice) -> list[str]:
    """Flags with which the request would fit on this machine."""
    request, best = choice.request, choice.best
    found = [f"--concurrency {fitting}"] if (fitting := best.sequences(request.context)) else []
    longest = longest_context(request.context, lambda context: best.sequences(context) >= request.concurrency)
    found += [f"--context {longest}"] if longest else []
    if (spread := best_spread(choice)) and spread.sequences(request.context) >= request.concurrency:
        found += [f"--decode-context-parallel {spread.tensor_parallel} (without prefix caching)"]
    return found


def table(choice: Choice, found: Sequence[Remedy], contexts: Sequence[int]) -> list[str]:
    """Each remedy with the weights of a rank and what fits."""
    rows = []
    for each in found:
        best = each.choice.best
        name = ", ".join(part for part in (each.weights and f"--weights {each.weights}", each.name) if part)
        rows.append(
            f"  {name:<36}{best.describe():<22}{gib(best.forecast.weights):>12}"
            + "".join(f"{best.sequences(context):>10,}" for context in contexts)
        )
    heading = f"{'Sequences that would fit at once with':<60}{'weights':>12}"
    return [heading + "".join(f"{tokens(each):>10}" for each in contexts), *rows]


def either(parts: Sequence[str]) -> str:
    """a, b, or c."""
    return ", or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
