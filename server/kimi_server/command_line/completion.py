"""`kimi-linear completion`: a script for the shell, which asks this command for the words that may stand next."""

import argparse
from collections.abc import Callable, Sequence

from kimi_server.command_line.parser import examples, path

Build = Callable[[Sequence[str]], argparse.ArgumentParser]  # of the words of a command line

SCRIPTS = {
    "bash": r"""_kimi_linear() {
    local IFS=$'\n'
    COMPREPLY=($(kimi-linear completion --candidates -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _kimi_linear kimi-linear
""",
    "zsh": r"""#compdef kimi-linear
_kimi_linear() {
    local -a found
    found=(${(f)"$(kimi-linear completion --candidates -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _kimi_linear kimi-linear
""",
    "fish": r"""function __kimi_linear
    set -l current (commandline -ct)
    set -l words (commandline -opc) "$current"
    set -l found (kimi-linear completion --candidates -- $words[2..] 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c kimi-linear -f -a '(__kimi_linear)'
""",
}


def completion(parser: argparse.ArgumentParser, build: Build) -> Callable[[argparse.Namespace], int]:
    """Add the subcommand's arguments to its parser; returns the function that runs it."""
    parser.add_argument("shell", choices=[*SCRIPTS], nargs="?", metavar="SHELL", help=", ".join(SCRIPTS))
    parser.add_argument("--candidates", action="store_true", help=argparse.SUPPRESS)  # what the scripts ask with
    examples(
        parser,
        "kimi-linear completion bash > ~/.local/share/bash-completion/completions/kimi-linear",
        "kimi-linear completion zsh > ~/.zfunc/_kimi-linear     # a folder of $fpath",
        "kimi-linear completion fish > ~/.config/fish/completions/kimi-linear.fish",
    )

    def run(args: argparse.Namespace) -> int:
        if args.candidates:
            print("\n".join(candidates(build, args.further or [""])))
        elif args.shell:
            print(SCRIPTS[args.shell], end="")
        else:
            parser.error(f"SHELL is missing; give one of {', '.join(SCRIPTS)}")
        return 0

    return run


def candidates(build: Build, words: Sequence[str]) -> list[str]:
    """What the last of `words`, those after `kimi-linear`, may become; empty where a file or a free text is meant."""
    *before, begun = words
    if "--" in before:
        return []
    called = list(path(build(before), before))
    flags = {option: action for one in called for action in one._actions for option in action.option_strings}
    last = flags.get(before[-1]) if before else None
    if last is not None and last.nargs != 0:  # its value
        found = [str(choice) for choice in last.choices or ()]
    elif begun.startswith("-"):
        shown = [action for action in called[-1]._actions if action.help != argparse.SUPPRESS]
        found = [option for action in shown for option in action.option_strings]
    else:
        positional = [action for action in called[-1]._actions if not action.option_strings]
        found = [str(choice) for action in positional for choice in action.choices or ()]
    return sorted({one for one in found if one.startswith(begun)})
