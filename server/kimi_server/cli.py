"""The `kimi-linear` command: one function a subcommand, which imports what it needs when it is asked for."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kimi_server.command_line.parser import Parser, check_flags, examples
from vllm_kimi_linear import __version__

Run = Callable[[argparse.Namespace], int]
AFTER_DASHES = ("serve", "completion")  # those that take words after `--`


def demo(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument(
        "--dir", type=Path, default=Path(".demo"), help="folder for the checkpoint and the log (default: .demo)"
    )
    parser.add_argument("--prompt", help="ask a random checkpoint this, and not the trained one about its log")
    parser.add_argument("--tokens", type=int, default=64, help="length of the answer (default: 64)")
    parser.add_argument(
        "--check", action="store_true", help="ask transformers, though its answers are kept with the checkpoint's hash"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when all is asked, as always without a terminal; else the server and a page stay open until Ctrl-C",
    )
    examples(
        parser,
        "kimi-linear demo",
        "kimi-linear demo --once --check",
        'kimi-linear demo --prompt "What is a delta rule?" --tokens 16',
    )

    def run(args: argparse.Namespace) -> int:
        from kimi_demo import demo

        return demo.run(args.dir, args.prompt, args.tokens, args.check, args.once)

    return run


def plan(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.planner import command

    return command.plan(parser)


def serve(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.planner import command

    return command.serve(parser)


def doctor(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.doctor import command

    return command.doctor(parser)


def gateway(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.gateway import command

    return command.gateway(parser)


def keys(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.gateway.keys import command

    return command.keys(parser)


def completion(parser: argparse.ArgumentParser) -> Run:
    from kimi_server.command_line import completion

    return completion.completion(parser, build)


# Name -> what it does, and the function that gives a parser its arguments and returns what runs them.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "demo": ("serve a small model, ask it about a log, compare with transformers, leave a page open", demo),
    "plan": ("say whether a model fits on a machine, and write the flags for vLLM", plan),
    "serve": ("plan, and start vLLM with the result", serve),
    "doctor": ("say what this machine has, what it lacks and whether it can serve", doctor),
    "gateway": ("run the gateway for vLLM servers: keys, limits, fair admission, sessions", gateway),
    "keys": ("add, list, limit and revoke the gateway's API keys", keys),
    "completion": ("print a script that completes this command in a shell", completion),
}


def build(argv: Sequence[str]) -> Parser:
    """The parser; only the subcommand that `argv` begins with has its arguments."""
    parser = Parser(prog="kimi-linear", description="Kimi Linear on vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    examples(parser, "kimi-linear doctor", "kimi-linear plan --help", "kimi-linear gateway --config gateway.yaml")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (text, prepare) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in argv[:1]:
            command.set_defaults(run=prepare(command))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    if argv[:1] and argv[0] in COMMANDS:
        check_flags(parser, argv[:cut])
    args = parser.parse_args(argv[:cut], argparse.Namespace(further=argv[cut + 1 :]))
    if args.further and args.command not in AFTER_DASHES:
        parser.error(f"{args.command} takes nothing after --; remove {' '.join(args.further)}")
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
