"""`kimi-linear gateway` and `kimi-linear gateway key`."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_server.command_line.parser import examples

WORKERS = (
    "--workers is {}: a gateway counts tokens, queues and keys in one process, and several would each count alone: "
    "leave it at 1, or put several gateways behind a router, each with replicas of its own."
)


def gateway(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the subcommand's arguments to its parser; returns the function that runs it."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="gateway.yaml, see docs/guide/gateway.md")
    parser.add_argument("--host", help="the address to listen on, in place of the file's")
    parser.add_argument("--port", type=int, help="the port to listen on, in place of the file's")
    parser.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="a certificate with its chain, to speak TLS")
    parser.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key")
    parser.add_argument("--workers", type=int, default=1, help="always 1")
    key = parser.add_subparsers(dest="gateway_command").add_parser(
        "key", help="make an API key: print it once, with its entry for the file of keys"
    )
    examples(
        parser,
        "kimi-linear gateway --config gateway.yaml",
        "kimi-linear gateway --config gateway.yaml --port 8443 --ssl-certfile tls.crt --ssl-keyfile tls.key",
    )
    examples(key, "kimi-linear gateway key team-a-web --owner team-a     # `kimi-linear keys add` writes the file, too")
    key.add_argument("--owner", help="whose it is; keys of one owner share cached prefixes (default: the key's own)")
    key.add_argument("id", help="the name under which the key is counted and logged")
    return run_gateway


def run_gateway(args: argparse.Namespace) -> int:
    """Run the gateway until it is stopped, or make a key; returns the exit status."""
    from kimi_server.gateway.config.settings import SettingsError

    if args.gateway_command == "key":
        return make_key(args.id, args.owner)
    if args.workers != 1:
        return complain(WORKERS.format(args.workers))
    if args.config is None:
        return complain("--config is missing: name a gateway.yaml, see docs/guide/gateway.md.")
    try:
        given = {name: getattr(args, name) for name in ("host", "port", "ssl_certfile", "ssl_keyfile")}
        return serve(args.config, **given)
    except SettingsError as error:
        return complain(str(error))


def serve(config: Path, **overrides: Any) -> int:
    """Serve until a signal; `overrides` are fields of the file that the command line gives."""
    from kimi_server.gateway.config.settings import load
    from kimi_server.gateway.gateway import Gateway
    from kimi_server.gateway.server import Server

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("kimi_server").setLevel(logging.INFO)  # libraries' well-being is not the operator's concern
    gateway = Gateway(load(config, **overrides))
    server = Server(gateway)
    server.run()
    return 0 if server.started and not server.failed else 1


def make_key(key_id: str, owner: str | None) -> int:
    from kimi_server.gateway.keys.keys_file import generate_key

    key, entry = generate_key(key_id, owner)
    print(f"The key, which is stored nowhere:\n\n    {key}\n\nIts entry under `keys:` in the file of keys:\n\n{entry}")
    return 0


def complain(message: str) -> int:
    print(f"kimi-linear gateway: {message}", file=sys.stderr)
    return 2
