"""`kimi-linear plan` and `kimi-linear serve`: read the arguments, print the plan, write its YAML, start vLLM."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kimi_server.command_line.parser import examples
from kimi_server.planner import answer, refusal, report, sizes, start
from kimi_server.planner.checkpoints import read_config
from kimi_server.planner.gpus import SIZE, Machine, is_number, machine
from kimi_server.planner.plan import Choice, Request, choose
from kimi_server.planner.remedies import remedies
from kimi_server.planner.serve_config import yaml
from kimi_server.planner.stored import CAPABILITIES, GUIDE, STORED, WHILE_LOADING, as_stored
from kimi_server.vllm_program import vllm_program
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes

MILLION = 1 << 20  # tokens
EXAMPLE = "moonshotai/Kimi-Linear-48B-A3B-Instruct"


def plan(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `kimi-linear plan` to its parser; returns the function that runs it."""
    _add_arguments(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--brief", action="store_true", help="print only the answer and its command")
    shown.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    examples(
        parser,
        f"kimi-linear plan {EXAMPLE} --gpus 4xH100-80GB",
        f"kimi-linear plan {EXAMPLE} --gpus 2x24GB --context 128K",
        f"kimi-linear plan {EXAMPLE} --context 128K --concurrency 8 --out serve.yaml",
        f"kimi-linear plan {EXAMPLE} --gpus 1xH100-80GB --weights int4 --brief",
    )
    return lambda args: _answer(_plan, args)


def serve(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `kimi-linear serve` to its parser; returns the function that runs it."""
    _add_arguments(parser)
    parser.epilog = "Arguments after `--` go to `vllm serve` unchanged.\n"
    examples(
        parser,
        f"kimi-linear serve {EXAMPLE} --context 128K",
        f"kimi-linear serve {EXAMPLE} -- --trust-remote-code --port 8001",
    )
    return lambda args: _answer(_serve, args)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, its config.json, or a name on the hub")
    parser.add_argument("--gpus", help="4xH100-80GB, 2x24GB, or 2 (default: those that nvidia-smi shows)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--memory", help="memory of one GPU, or for one rank on a CPU, such as 80G (default: probed)")
    parser.add_argument("--context", help="tokens of the longest sequence, such as 128K (default: 1M, or all)")
    parser.add_argument("--concurrency", default="1", help="sequences of that length at once (default: 1)")
    parser.add_argument("--tensor-parallel", metavar="N", help="ranks of a server (default: chosen; 1 on a CPU)")
    parser.add_argument(
        "--decode-context-parallel",
        metavar="N",
        default="1",
        help="ranks that share the latent KV of a sequence, without prefix caching (default: 1)",
    )
    parser.add_argument("--dtype", help="bfloat16, or on a CPU also float32 (default: the config's)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="only auto: the latent KV has the dtype of the model")
    parser.add_argument("--state-dtype", default="auto", help="float32, or on a GPU bfloat16 (default: float32)")
    parser.add_argument(
        "--weights",
        choices=[*STORED],
        help="weights to plan for in place of MODEL's own; on a GPU fp8 is made of them while they are loaded",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the plan there, for `vllm serve --config`")


def _answer(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return command(args)
    except ConfigError as error:
        print(f"kimi-linear {args.command}: {error}", file=sys.stderr)
        return 1


def _plan(args: argparse.Namespace) -> int:
    choice = _choice(args, one_server=False)
    found = [] if choice.fits else remedies(choice)
    shorter = refusal.shorter(choice) if args.context is None and not choice.fits else None
    commands = _commands(args, choice) if choice.fits else []
    if choice.fits and args.out:
        _write(args.out, yaml(choice, _served_name(args, choice)))
    if args.json:
        print(json.dumps(answer.as_json(choice, found, commands, report.contexts(choice), shorter), indent=2))
    else:
        checkpoint = None if choice.request.quantization else args.weights
        print(answer.yes(choice, commands, checkpoint) if choice.fits else refusal.answer(choice, found, shorter))
    if not args.json and not args.brief:
        print("", report.report(choice) if choice.fits else report.refused(choice, found), sep="\n")
    return 0 if choice.fits else 1


def _commands(args: argparse.Namespace, choice: Choice) -> list[str]:
    """What starts the plan: from its YAML where one is written, or by a plan of the same request."""
    if args.out:
        return start.vllm_commands(choice, _served_name(args, choice), str(args.out))
    gpus, memory = _gpus(args, choice)
    given = {
        "--gpus": gpus,
        "--device": args.device,
        "--memory": memory,
        "--context": sizes.flag(choice.request.context) if args.context is None else args.context,
        "--decode-context-parallel": None if choice.request.context_parallel == 1 else args.decode_context_parallel,
        "--weights": args.weights if choice.request.quantization else None,
        "--dtype": args.dtype,
        "--state-dtype": None if args.state_dtype == "auto" else args.state_dtype,
    }
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    return start.serve_commands(choice, _served_name(args, choice), flags)


def _gpus(args: argparse.Namespace, choice: Choice) -> tuple[str | None, str | None]:
    """--gpus and --memory of one server; None where the GPUs that it sees have their own name and size."""
    count, name = choice.best.tensor_parallel, choice.machine.short
    if SIZE.fullmatch(name):
        return f"{count}x{name.replace(' ', '')}", None
    if args.gpus and is_number(args.gpus):
        return str(count), None
    return f"{count}x{name}" if args.gpus and args.memory else None, args.memory


def _serve(args: argparse.Namespace) -> int:
    choice = _choice(args, one_server=True)
    if not choice.fits:
        raise ConfigError(refusal.sentence(choice))
    print(answer.yes(choice), report.report(choice), sep="\n\n", flush=True)
    if args.out is None:
        folder = Path(tempfile.mkdtemp(prefix="kimi-linear-"))
        args.out = folder / "serve.yaml"
    _write(args.out, yaml(choice, args.model))
    command = [*vllm_program(), "serve", args.model, "--config", str(args.out), *args.further]
    print(f"\nStart\n  {shlex.join(command)}", flush=True)
    os.execvp(command[0], command)


def _choice(args: argparse.Namespace, one_server: bool) -> Choice:
    config = read_config(args.model)
    ranks = None if args.tensor_parallel is None else sizes.parse("--tensor-parallel", args.tensor_parallel, "2")
    place, weights = machine(args.device, args.gpus, args.memory, ranks or 1), args.weights
    quantization = WHILE_LOADING.get(weights) if place.device == "cuda" else None
    if weights:
        config = as_stored(config, weights)
        _check_weights(weights, place, served=one_server and not quantization)
    request = Request(
        config=config,
        context=_context(args.context, config),
        concurrency=sizes.parse("--concurrency", args.concurrency, "8"),
        dtype=args.dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        kv_cache_dtype=args.kv_cache_dtype,
        state_dtype=args.state_dtype,
        tensor_parallel=ranks,
        context_parallel=sizes.parse("--decode-context-parallel", args.decode_context_parallel, "4"),
        one_server=one_server,
        quantization=quantization,
    )
    return choose(request, place)


def _context(given: str | None, config: Mapping[str, Any]) -> int:
    """Tokens of --context, or of the longest sequence that the model reads, up to a million."""
    if given is not None:
        return sizes.parse("--context", given, "128K")
    return min(MILLION, ModelSizes.from_config(config).max_context or MILLION)


def _check_weights(weights: str, place: Machine, served: bool) -> None:
    """Raises ConfigError for --weights that the GPU does not compute with, or that only a checkpoint can serve."""
    if served:
        raise ConfigError(f"--weights is {weights}, which takes a checkpoint; give its folder as MODEL ({GUIDE})")
    if place.capability is not None and place.capability < (least := CAPABILITIES[weights]):
        raise ConfigError(
            f"--weights is {weights}, which needs compute capability {least[0]}.{least[1]}, and {place.short} has "
            f"{place.capability[0]}.{place.capability[1]}; plan for int4 or for the checkpoint as it is"
        )


def _served_name(args: argparse.Namespace, choice: Choice) -> str | None:
    """What the commands call the model: MODEL, or the folder of one made of it; None for a bare config.json."""
    if Path(args.model).is_file():
        return None
    stored = args.weights and not choice.request.quantization
    return f"{args.model.rstrip('/').rpartition('/')[2]}-{args.weights}" if stored else args.model


def _write(path: Path, text: str) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out is {str(path)!r}; vLLM reads only .yaml and .yml, choose such a name")
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--out is {str(path)!r}: {error.strerror}; name a file that can be written") from None
