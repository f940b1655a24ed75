"""An argument parser that says what a mistyped subcommand, flag or choice meant, and shows examples in its help."""

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Its subparsers are of the same class."""

    def __init__(self, **more: Any) -> None:
        # No prefixes of flags: a later version may have a second one that begins so.
        ours: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**ours | more)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, and for a wrong choice the one that was meant."""
        if found := re.search(r"invalid choice: '([^']*)'", message):
            choices = [str(choice) for action in self._actions for choice in action.choices or ()]
            message += suggestion(found[1], choices)
        super().error(message)


def examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Let the help of `parser` end with these command lines, which begin with `kimi-linear`."""
    parser.epilog = "\n".join([*filter(None, [parser.epilog]), "examples:", *(f"  {line}" for line in lines)])


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean gateway?` of gatway; empty where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Subcommand -> its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def path(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[argparse.ArgumentParser]:
    """`parser`, and those of the subcommands that `words` name one after the other."""
    yield parser
    for index, word in enumerate(words):
        if word in (inner := subparsers(parser)):
            yield from path(inner[word], words[index + 1 :])
            return


def check_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Exit with an error for a flag that nobody knows. argparse would first miss what the flag's value is taken for."""
    called = list(path(parser, words))
    known = [option for one in called for action in one._actions for option in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[\w-]+", flag) and flag not in known:
            called[-1].error(f"there is no flag {flag}{suggestion(flag, known)}")
