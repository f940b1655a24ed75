"""`kimi-linear doctor`: print the findings and what would be served."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence

from kimi_server.command_line.parser import examples
from kimi_server.doctor import install, machine
from kimi_server.doctor.finding import Finding
from kimi_server.planner import refusal, sizes
from kimi_server.planner.checkpoints import read_config
from kimi_server.planner.gpus import machine as machine_to_plan_for
from kimi_server.planner.plan import Request, choose
from vllm_kimi_linear.config.errors import ConfigError

MODEL = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
CONTEXT = 128 << 10  # tokens
PLAN = f"`kimi-linear plan {MODEL} --context {sizes.flag(CONTEXT)}`"


def doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the subcommand's arguments to its parser; returns the function that runs it."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "Exits with 0 if a server can start, and with 1 if not.\n"
    examples(parser, "kimi-linear doctor", "kimi-linear doctor --json")
    return run


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 where there is a fault."""
    found = findings()
    if args.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        for one in found:
            print(f"{'' if one.level == 'ok' else one.level:8}{one.about:11}{one.text}")
        print(f"\n{verdict(found)}")
    return 1 if any(one.level == "fault" for one in found) else 0


def findings() -> list[Finding]:
    """All of them; the GPUs decide what else is looked for."""
    graphics, on_gpu = machine.gpus()
    software = install.software()
    found = [machine.processor(), machine.memory(), graphics, *software, machine.compiler(on_gpu)]
    if on_gpu:  # then the processor's instructions are not vLLM's concern
        found = [dataclasses.replace(one, level="ok") if one.about == "processor" else one for one in found]
    else:
        found.append(machine.libnuma())
    if not any(one.level == "fault" for one in software):
        found.append(install.kernels("cuda" if on_gpu else "cpu"))
    return [*found, model()]


def model() -> Finding:
    """Whether the 48B fits, which does not keep a smaller one from being served."""
    try:
        request = Request(config=read_config(MODEL), context=CONTEXT, concurrency=1, dtype="bfloat16")
        choice = choose(request, machine_to_plan_for(None, None, None, 1))
    except ConfigError as error:
        return Finding("warning", "the 48B", str(error))
    if not choice.fits:
        return Finding("warning", "the 48B", f"{refusal.head(choice)}; {PLAN} says what is needed")
    held = sizes.documents(choice.best.sequences(CONTEXT), CONTEXT)
    return Finding("ok", "the 48B", f"fits: {held} at once, with {choice.best.describe()}")


def verdict(found: Sequence[Finding]) -> str:
    """The last line, for a person."""
    if faults := [one.about for one in found if one.level == "fault"]:
        return f"A server cannot start here: see {', '.join(dict.fromkeys(faults))}."
    on = "CPU" if any(one.about == "GPUs" and one.text == "none" for one in found) else "GPU"
    fits = any(one.about == "the 48B" and one.level == "ok" for one in found)
    return f"This machine can serve on its {on}" + ("." if fits else ", but only models smaller than the 48B.")
