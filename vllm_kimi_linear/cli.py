"""The `kimi-linear` command."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_kimi_linear import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kimi-linear", description="Kimi Linear on vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="serve a small random checkpoint, ask it something, compare with transformers"
    )
    demo.add_argument(
        "--dir", type=Path, default=Path(".demo"), help="where the checkpoint and the log are kept (default: .demo)"
    )
    demo.add_argument("--prompt", default="What do you remember of a very long document?")
    demo.add_argument("--tokens", type=int, default=64, help="length of the answer (default: 64)")
    args = parser.parse_args(argv)

    from vllm_kimi_linear import tour

    return tour.run(args.dir, args.prompt, args.tokens)
