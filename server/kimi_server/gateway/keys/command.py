"""`kimi-linear keys`: add, list, limit and revoke the keys of a keys.yaml."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_server.command_line.parser import examples

# Flag's name -> what it limits.
LIMITS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute, of prompts and answers",
    "concurrency": "requests at once",
    "longest_context": "tokens of a prompt with its answers",
}
NONE = "none"


def keys(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the subcommands to the parser; returns the function that runs them."""
    examples(
        parser, "kimi-linear keys add team-a", "kimi-linear keys list", "kimi-linear keys revoke team-a --file k.yaml"
    )
    commands = parser.add_subparsers(dest="keys_command", required=True, metavar="command")
    for name, (text, run, lines) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "--file", type=Path, default=Path("keys.yaml"), help="the file of keys (default: keys.yaml, here)"
        )
        if name == "list":
            command.add_argument("--json", action="store_true", help="print the keys as JSON")
        else:
            command.add_argument("id", help="the name under which the key is counted and logged")
        if name == "add":
            command.add_argument("--owner", help="whose it is; keys of one owner share cached prefixes")
            command.add_argument("--metrics", action="store_true", help="let the key read /metrics on the API's port")
        if name in ("add", "limit"):
            for limit, meaning in LIMITS.items():
                command.add_argument(f"--{limit.replace('_', '-')}", type=_limit, metavar="N", help=meaning)
        examples(command, *lines)
        command.set_defaults(run_keys=run)
    return _run


def _limit(text: str) -> int | str:
    """A whole number from 1, or `none`."""
    if text != NONE and (not text.isascii() or not text.isdigit() or not int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; give a whole number from 1, or {NONE}")
    return text if text == NONE else int(text)


def _run(args: argparse.Namespace) -> int:
    from kimi_server.gateway.config.yaml_file import SettingsError

    try:
        args.run_keys(args)
    except SettingsError as error:
        print(f"kimi-linear keys {args.keys_command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add(args: argparse.Namespace) -> None:
    from kimi_server.gateway.keys import edit, stored
    from kimi_server.gateway.keys.keys_file import new_key

    key, sha256 = new_key()
    entry: dict[str, Any] = {"id": args.id, "owner": args.owner, "metrics": args.metrics, "sha256": sha256}
    entry = {name: value for name, value in (entry | _limits(args)).items() if value not in (None, False)}
    stored.change(args.file, lambda text: edit.add(text, entry, args.file), create=True)
    print(f"The key, which is stored nowhere and shown this once:\n\n    {key}\n\nIts hash is in {args.file}.")


def _list(args: argparse.Namespace) -> None:
    from kimi_server.gateway.config.yaml_file import read_bytes
    from kimi_server.gateway.keys.keys_file import parse_keys

    found = [dataclasses.asdict(key) for key in parse_keys(read_bytes(args.file), args.file).keys]
    for key in found:
        del key["sha256"]
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [list(found[0]), *([_shown(value) for value in key.values()] for key in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _shown(value: Any) -> str:
    return "-" if value in (None, False) else "yes" if value is True else str(value)


def _revoke(args: argparse.Namespace) -> None:
    from kimi_server.gateway.keys import edit, stored

    stored.change(args.file, lambda text: edit.revoke(text, args.id, args.file))
    print(f"Key {args.id!r} is removed from {args.file}; its running requests may finish.")


def _set_limits(args: argparse.Namespace) -> None:
    from kimi_server.gateway.config.yaml_file import SettingsError
    from kimi_server.gateway.keys import edit, stored

    given = _limits(args)
    if not given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in LIMITS)
        raise SettingsError(f"no limit is given: give one of {flags}.")
    stored.change(args.file, lambda text: edit.limit(text, args.id, given, args.file))
    shown = ", ".join(f"{name} {NONE if value is None else value}" for name, value in given.items())
    print(f"Key {args.id!r} of {args.file}: {shown}.")


def _limits(args: argparse.Namespace) -> dict[str, int | None]:
    """The limits that are given; None for `none`."""
    given = {name: getattr(args, name) for name in LIMITS}
    return {name: None if value == NONE else value for name, value in given.items() if value is not None}


COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], None], tuple[str, ...]]] = {
    "add": (
        "make a key: print it once, and write its hash to the file",
        _add,
        (
            "kimi-linear keys add team-a-web --owner team-a",
            "kimi-linear keys add batch --concurrency 2 --tokens-per-minute 200000 --file deploy/keys/keys.yaml",
        ),
    ),
    "list": ("list the keys with their limits", _list, ("kimi-linear keys list", "kimi-linear keys list --json")),
    "revoke": ("remove a key from the file", _revoke, ("kimi-linear keys revoke team-a-web",)),
    "limit": (
        "change the limits of a key; the value none removes one",
        _set_limits,
        (
            "kimi-linear keys limit batch --requests-per-minute 60 --concurrency 4",
            "kimi-linear keys limit batch --longest-context none",
        ),
    ),
}
