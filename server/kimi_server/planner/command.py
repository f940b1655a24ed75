"""`kimi-linear plan` and `kimi-linear serve`: read the arguments, print the plan, write its YAML, start vLLM."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kimi_server.planner import report, sizes
from kimi_server.planner.checkpoints import read_config
from kimi_server.planner.gpus import machine
from kimi_server.planner.plan import Choice, Request, choose
from kimi_server.planner.serve_config import yaml
from kimi_server.vllm_program import vllm_program
from vllm_kimi_linear.config.errors import ConfigError


def plan(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `kimi-linear plan` to its parser; returns the function that runs it."""
    _add_arguments(parser)
    return lambda args: _answer(_plan, args)


def serve(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `kimi-linear serve` to its parser; returns the function that runs it."""
    _add_arguments(parser)
    parser.epilog = "What follows `--` is handed to `vllm serve` as it is."
    return lambda args: _answer(_serve, args)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, its config.json, or a name on the hub")
    parser.add_argument("--gpus", help="such as 4xH100-80GB (default: those that nvidia-smi shows)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--memory", help="of one GPU, or that one rank on a CPU may use, such as 80G (default: probed)")
    parser.add_argument("--context", default="1M", help="tokens of the longest sequence, such as 128K (default: 1M)")
    parser.add_argument("--concurrency", default="1", help="sequences of that length at once (default: 1)")
    parser.add_argument("--tensor-parallel", metavar="N", help="ranks of a server (default: chosen; on a CPU 1)")
    parser.add_argument(
        "--decode-context-parallel",
        metavar="N",
        default="1",
        help="ranks that the latent KV of a sequence is spread over; untried with this model (default: 1)",
    )
    parser.add_argument("--dtype", help="bfloat16, or on a CPU also float32 (default: the config's)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="only auto: the latent KV has the dtype of the model")
    parser.add_argument("--state-dtype", default="auto", help="float32, or on a GPU bfloat16 (default: float32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the YAML for `vllm serve --config` there")


def _answer(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return command(args)
    except ConfigError as error:
        print(f"kimi-linear {args.command}: {error}", file=sys.stderr)
        return 1


def _plan(args: argparse.Namespace) -> int:
    choice = _choice(args, one_server=False)
    print(report.report(choice))
    if args.out:
        _write(args.out, yaml(choice, _served_name(args.model)))
        lines = report.commands(choice, _served_name(args.model), str(args.out))
        print("\n".join(["", "Start", *(f"  {line}" for line in lines)]))
    return 0


def _serve(args: argparse.Namespace) -> int:
    choice = _choice(args, one_server=True)
    print(report.report(choice), flush=True)
    if args.out is None:
        folder = Path(tempfile.mkdtemp(prefix="kimi-linear-"))
        args.out = folder / "serve.yaml"
    _write(args.out, yaml(choice, _served_name(args.model)))
    command = [*vllm_program(), "serve", args.model, "--config", str(args.out), *args.further]
    print(f"\nStart\n  {shlex.join(command)}", flush=True)
    os.execvp(command[0], command)


def _choice(args: argparse.Namespace, one_server: bool) -> Choice:
    config = read_config(args.model)
    ranks = None if args.tensor_parallel is None else sizes.parse("--tensor-parallel", args.tensor_parallel, "2")
    request = Request(
        config=config,
        context=sizes.parse("--context", args.context, "128K"),
        concurrency=sizes.parse("--concurrency", args.concurrency, "8"),
        dtype=args.dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        kv_cache_dtype=args.kv_cache_dtype,
        state_dtype=args.state_dtype,
        tensor_parallel=ranks,
        context_parallel=sizes.parse("--decode-context-parallel", args.decode_context_parallel, "4"),
        one_server=one_server,
    )
    return choose(request, machine(args.device, args.gpus, args.memory, ranks or 1))


def _served_name(model: str) -> str | None:
    """What the YAML calls the model; None for a bare config.json, which cannot be served."""
    return None if Path(model).is_file() else model


def _write(path: Path, text: str) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out is {str(path)!r}; vLLM reads only .yaml and .yml, name it so")
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--out is {str(path)!r}: {error.strerror}; name a file that can be written") from None
