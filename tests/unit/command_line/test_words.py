"""Help, typos and completion of `kimi-linear`."""

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_server.cli import COMMANDS, build, main
from kimi_server.command_line.completion import SCRIPTS, candidates
from kimi_server.command_line.parser import check_flags, subparsers


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every subcommand and of theirs."""
    for name in COMMANDS:
        own = subparsers(build([name]))[name]
        yield name, own
        yield from ((f"{name} {inner}", parser) for inner, parser in subparsers(own).items())


PARSERS = dict(parsers())


def examples(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"^  (kimi-linear .*)$", parser.format_help().partition("\nexamples:\n")[2], re.MULTILINE)


@pytest.mark.parametrize("name", PARSERS)
def test_help_ends_with_examples_that_can_be_typed(name: str) -> None:
    lines = examples(PARSERS[name])
    assert lines, "no example"
    for line in lines:
        words = shlex.split(line.partition(">")[0], comments=True)[1:]
        assert " ".join(words).startswith(name)
        words = words[: words.index("--")] if "--" in words else words
        check_flags(build(words), words)
        build(words).parse_args(words)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["gatway"], "gateway"),
        (["gateway", "kye", "me"], "key"),
        (["keys", "revok", "me"], "revoke"),
        (["plan", "--contxt", "5", "MODEL"], "--context"),
        (["plan", "--context-=5", "MODEL"], "--context"),
        (["keys", "limit", "me", "--concurency", "5"], "--concurrency"),
        (["plan", "MODEL", "--device", "cdua"], "cuda"),
        (["completion", "bsh"], "bash"),
    ],
)
def test_a_typo_names_what_was_meant(capsys: pytest.CaptureFixture[str], typed: list[str], meant: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(typed)
    assert left.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"did you mean {meant}?")


def test_what_is_like_nothing_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "MODEL", "--zzz"])
    said = capsys.readouterr().err
    assert "there is no flag --zzz" in said and "did you mean" not in said


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["g"], ["gateway"]),
        ([""], sorted(COMMANDS)),
        (["keys", ""], ["add", "limit", "list", "revoke"]),
        (["plan", "--dev"], ["--device"]),
        (["plan", "--device", ""], ["cpu", "cuda"]),
        (["plan", "--out", ""], []),
        (["keys", "add", "--ow"], ["--owner"]),
        (["gateway", "--config", "x", ""], ["key"]),
        (["completion", "z"], ["zsh"]),
        (["completion", "--"], ["--help"]),
        (["serve", "MODEL", "--", "--po"], []),
    ],
)
def test_what_may_stand_next(words: list[str], found: list[str]) -> None:
    assert candidates(build, words) == found


# What a shell of each kind is told so that it completes `kimi-linear keys re`.
ASK = {
    "bash": "source {script}; COMP_WORDS=(kimi-linear keys re); COMP_CWORD=2; _kimi_linear; echo ${{COMPREPLY[@]}}",
    "zsh": "compdef() {{ }}; compadd() {{ shift; print $@ }}; source {script}; words=(kimi-linear keys re); CURRENT=3;"
    " _kimi_linear",
    "fish": "source {script}; complete -C 'kimi-linear keys re'",
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_completes(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    command = tmp_path / "kimi-linear"
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nshift 3\ntest "$1 $2" = \'keys re\' && echo revoke\n'
    )
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    ask = [shell, "-c", ASK[shell].format(script=script)]
    done = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["revoke"], done.stderr
    assert (tmp_path / "asked").read_text() == "completion --candidates -- keys re\n"


def test_the_command_answers_what_the_scripts_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--candidates", "--", "keys", "re"]) == 0
    assert main(["completion", "--candidates", "--", "serve", "MODEL", "--", "--po"]) == 0
    assert capsys.readouterr().out == "revoke\n\n"


def test_a_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion"])
    assert "SHELL is missing; give one of bash, zsh, fish" in capsys.readouterr().err
