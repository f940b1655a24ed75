"""deploy/runs: each script shows its commands with --print, runs those and no others, and every flag in them exists."""

import argparse
import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from kimi_server.cli import COMMANDS
from kimi_server.gateway.config import settings

ROOT = Path(__file__).parents[3]
RUNS: dict[str, list[tuple[str, ...]]] = {
    "single-gpu.sh": [()],
    "million-tokens.sh": [()],
    "two-replicas.sh": [()],
    "prefill-decode.sh": [()],
    "ray.sh": [(), ("join", "10.0.0.1")],
}
CASES = [(script, arguments) for script, several in RUNS.items() for arguments in several]
PROGRAMS = ("vllm", "kimi-linear", "ray")


def script(folder: Path, name: str, *arguments: str) -> str:
    """What a script prints, where the programs it calls only write down how they were called."""
    for program in PROGRAMS:
        stand_in = folder / program
        text = f'#!/bin/sh\necho "{program} $*" >> {folder}/called\n'
        if program == "kimi-linear":  # the gateway runs until its servers, which end with it, are under way
            counted = f"grep -c ^vllm {folder}/called"
            text += f'[ "$1" != gateway ] || until [ "$({counted})" -ge 2 ]; do sleep 0.1; done\n'
        stand_in.write_text(text)
        stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OUT": str(folder)}
    environment.pop("MODEL", None)
    path = ROOT / "deploy" / "runs" / name
    done = subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed(folder: Path, name: str, arguments: tuple[str, ...]) -> list[str]:
    """Commands that --print shows, without the environment that they are given."""
    lines = script(folder, name, "--print", *arguments).splitlines()
    return [line.removeprefix("env ").split(" ", 1)[1] if line.startswith("env ") else line for line in lines]


def test_every_script_is_tested() -> None:
    assert {path.name for path in (ROOT / "deploy" / "runs").glob("*.sh")} == RUNS.keys()


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_print_runs_nothing(tmp_path: Path, name: str, arguments: tuple[str, ...]) -> None:
    assert printed(tmp_path, name, arguments)
    assert {path.name for path in tmp_path.iterdir()} == set(PROGRAMS)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_what_is_printed_is_what_is_run(tmp_path: Path, name: str, arguments: tuple[str, ...]) -> None:
    shown = printed(tmp_path, name, arguments)
    (tmp_path / "serve.yaml").touch()  # as the plan would write it
    script(tmp_path, name, *arguments)
    # Servers that run beside each other may be called in either order.
    assert sorted((tmp_path / "called").read_text().splitlines()) == sorted(shown)


def test_prefill_and_decode_have_a_port_each(tmp_path: Path, vllm_parser) -> None:
    (tmp_path / "serve.yaml").write_text("dtype: bfloat16\n")
    script(tmp_path, "prefill-decode.sh")
    gateway = settings.load(tmp_path / "gateway.yaml")
    ports = []
    for role in ("prefill", "decode"):
        parsed = vllm_parser.parse_args(["--config", str(tmp_path / f"{role}.yaml")])
        assert parsed.dtype == "bfloat16"
        (tier,) = parsed.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
        ports.append((tier["host"], tier["port"]))
    assert [one.place for one in gateway.prefill] == ports[:1] != ports[1:]


@pytest.mark.parametrize("name", ["two-replicas.sh", "prefill-decode.sh"])
def test_replicas_end_with_their_script(tmp_path: Path, name: str) -> None:
    (tmp_path / "serve.yaml").touch()
    (tmp_path / "pids").touch()
    running = f'[ "$1" != gateway ] || until [ "$(grep -c . {tmp_path}/pids)" -ge 2 ]; do sleep 0.1; done'
    for program, body in (("vllm", f"echo $$ >> {tmp_path}/pids; exec sleep 600"), ("kimi-linear", running)):
        (tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUT": str(tmp_path)}
    subprocess.run([ROOT / "deploy/runs" / name], env=environment, timeout=300, check=True)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 120
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{alive} still run"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def vllm_parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_every_flag_exists(vllm_parser, tmp_path: Path, name: str, arguments: tuple[str, ...]) -> None:
    for config in ("serve", "decode", "prefill"):
        (tmp_path / f"{config}.yaml").write_text("dtype: bfloat16\n")
    for line in printed(tmp_path, name, arguments):
        program, *words = shlex.split(line)
        if program == "vllm":
            assert words[0] == "serve"
            vllm_parser.parse_args(words[1:])
        elif program == "kimi-linear" and words[0] in COMMANDS:
            cut = words.index("--") if "--" in words else len(words)
            parser = argparse.ArgumentParser(exit_on_error=False)
            COMMANDS[words[0]][1](parser)
            parser.parse_args(words[1:cut])
            vllm_parser.parse_args(words[cut + 1 :])


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_every_plan_holds(tmp_path: Path, name: str, arguments: tuple[str, ...]) -> None:
    """What a script asks of its GPUs can be had."""
    from kimi_server.cli import main

    config = ROOT / "benchmarks" / "config_48b.json"
    for line in printed(tmp_path, name, arguments):
        program, command, *words = shlex.split(line)
        if program == "kimi-linear" and command in ("plan", "serve"):
            cut = words.index("--") if "--" in words else len(words)
            gpus = [] if "--gpus" in words else ["--gpus", "1xH200"]
            assert main(["plan", str(config), *words[1:cut], *gpus]) == 0
            assert json.dumps("priority") in (tmp_path / "serve.yaml").read_text()
