"""deploy/install/packages.py: which packages are asked of which tool, and what follows when one fails."""

import subprocess
from pathlib import Path

import pytest

from deploy.install import packages
from deploy.install.packages import NOT_ON_A_CPU, UV, Tool, pip, uv
from deploy.install.steps import Failed, Steps

ROOT = Path(__file__).resolve().parents[3]
TORCH = "torch==2.13.0+cpu"
# How each tool says that no index has a version, and another fault.
LACKING = {
    "pip": "ERROR: No matching distribution found for torch==2.13.0+cpu\n",
    "uv": "error: No solution found when resolving dependencies\n",
}
DISK_FULL = "No space left on device (os error 28)"


class FakeSteps(Steps):
    """Records commands; those that contain a key of `results` end as it says."""

    def __init__(self, results: dict[str, tuple[int, str]] | None = None) -> None:
        super().__init__(Path("log"), ROOT, {"PATH": "/bin"})
        self.results = results or {}
        self.commands: list[str] = []

    def run(self, title: str, command, may_fail: bool = False) -> tuple[int, str]:
        line = " ".join(command)
        self.commands.append(line)
        code, output = next((end for key, end in self.results.items() if key in line), (0, ""))
        if code and not may_fail:
            self.fail(title)
        return code, output


@pytest.fixture(params=[uv, pip])
def tool(request: pytest.FixtureRequest) -> Tool:
    return request.param("python")


def test_torch_from_the_configured_index(tool: Tool) -> None:
    steps = FakeSteps()
    packages.install_torch_cpu(steps, tool, TORCH)
    [command] = steps.commands
    assert command.startswith(" ".join(tool.install)) and command.endswith(f"--no-deps {TORCH}")


def test_torch_from_pytorch_only_where_the_index_has_none(tool: Tool) -> None:
    steps = FakeSteps({f"--no-deps {TORCH}": (1, LACKING[tool.name])})
    packages.install_torch_cpu(steps, tool, TORCH)
    _, fallback = steps.commands
    index = {"uv": "--default-index", "pip": "--index-url"}[tool.name]
    assert fallback.endswith(f"--no-deps {index} https://download.pytorch.org/whl/cpu {TORCH}")


def test_torch_that_fails_otherwise_stops_the_tool(tool: Tool) -> None:
    steps = FakeSteps({"torch": (1, DISK_FULL)})
    with pytest.raises(Failed, match="could not be installed"):
        packages.install_torch_cpu(steps, tool, TORCH)
    assert len(steps.commands) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_versions_of_the_lock(tool: Tool, device: str) -> None:
    steps = FakeSteps()
    packages.install_locked(steps, tool, device, ["a", "b>=1"])
    [command] = steps.commands
    assert f"--constraint deploy/install/locks/{device}.txt" in command and command.endswith("a b>=1")
    assert (f"--excludes {NOT_ON_A_CPU}" in command) == (device == "cpu" and tool.name == "uv")


def test_the_users_own_constraints_stand_beside_the_lock() -> None:
    steps = FakeSteps()
    packages.install_locked(steps, uv("python", ["/etc/mine.txt"]), "cuda", ["a"])
    assert "--constraint deploy/install/locks/cuda.txt --constraint /etc/mine.txt a" in steps.commands[0]


def test_an_index_without_a_locked_version_gives_another(tool: Tool) -> None:
    steps = FakeSteps({"locks/cuda.txt": (1, LACKING[tool.name])})
    packages.install_locked(steps, tool, "cuda", ["a"])
    locked, free = steps.commands
    assert "--constraint" in locked and "--constraint" not in free and free.endswith(" a")


def test_a_locked_install_that_fails_otherwise_stops_the_tool(tool: Tool) -> None:
    steps = FakeSteps({"locks/cuda.txt": (1, DISK_FULL)})
    with pytest.raises(Failed, match="could not be installed"):
        packages.install_locked(steps, tool, "cuda", ["a"])
    assert len(steps.commands) == 1


def test_only_what_is_there_is_removed_from_beside_torch(tmp_path: Path) -> None:
    tool = pip(str(tmp_path / "bin/python"))
    steps = FakeSteps()
    packages.remove_companions(steps, tool, ROOT)
    assert steps.commands == []
    (tmp_path / "lib/python3.11/site-packages/torchvision").mkdir(parents=True)
    packages.remove_companions(steps, tool, ROOT)
    assert steps.commands == [f"{tool.python} -m pip uninstall --yes torchvision"]


def test_what_is_removed_is_what_the_check_of_an_install_looks_at() -> None:
    from vllm_kimi_linear.supported.install_check import COMPANIONS

    lines = (ROOT / NOT_ON_A_CPU).read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == list(COMPANIONS)


@pytest.fixture
def settings_of_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that `pip config list` prints, for the test to fill."""
    lines: list[str] = []

    def config_list(command, **more) -> subprocess.CompletedProcess[str]:
        assert command == ["python", "-m", "pip", "config", "list"]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines), "")

    monkeypatch.setattr(packages.subprocess, "run", config_list)
    return lines


def test_uv_first_with_the_settings_of_pip(settings_of_pip: list[str]) -> None:
    settings_of_pip += ["global.constraint='/etc/a.txt /etc/b.txt'", "global.find-links='/wheels'"]
    steps = FakeSteps()
    first, second = packages.tools(steps, "python")
    assert (first.name, first.constraints, second.name) == ("uv", ["/etc/a.txt", "/etc/b.txt"], "pip")
    assert steps.environment["UV_FIND_LINKS"] == "/wheels"
    assert steps.commands == [f"python -m pip install {UV}"]


def test_without_uv_it_is_pip_with_a_word(settings_of_pip: list[str], capsys) -> None:
    steps = FakeSteps({UV: (1, LACKING["pip"])})
    assert [tool.name for tool in packages.tools(steps, "python")] == ["pip"]
    assert capsys.readouterr().out == f"{UV} is not available (log says why): pip installs, which takes longer.\n"
    assert steps.environment == {"PATH": "/bin"}


def test_a_setting_that_uv_cannot_be_told_makes_it_pip_with_a_word(settings_of_pip: list[str], capsys) -> None:
    settings_of_pip += ["global.only-binary=':all:'"]
    steps = FakeSteps()
    assert [tool.name for tool in packages.tools(steps, "python")] == ["pip"]
    said = capsys.readouterr().out
    assert said == "pip is configured with only-binary, which uv does not have: pip installs instead.\n"
    assert steps.commands == []


def test_pip_takes_over_where_uv_fails(capsys) -> None:
    steps = FakeSteps({"-m uv": (2, "error: Failed to initialize cache at `/root/.cache/uv`")})

    def install(tool: Tool) -> None:
        packages.install_dependencies(steps, tool, ROOT, "cpu", [TORCH, "a"])

    packages.by_the_first_that_can([uv("python"), pip("python")], install)
    assert f"uv failed ({TORCH} could not be installed): trying pip.\n" == capsys.readouterr().out
    by_uv, newer_pip, torch, rest = steps.commands
    assert "-m uv" in by_uv and "--upgrade pip>=" in newer_pip
    assert torch.endswith(TORCH) and rest.endswith(f"{TORCH} a")


def test_where_no_tool_can_the_last_says_why(capsys) -> None:
    steps = FakeSteps({"-m uv": (1, ""), "--upgrade pip": (1, "")})
    with pytest.raises(Failed, match=r"^a newer pip"):
        packages.by_the_first_that_can(
            [uv("python"), pip("python")],
            lambda tool: packages.install_dependencies(steps, tool, ROOT, "cuda", ["a"]),
        )
    assert capsys.readouterr().out.count("trying pip") == 1


def test_requirements_are_those_of_the_extras_with_torch_for_the_device() -> None:
    cpu = packages.requirements(ROOT, "cpu", ["server"])
    assert [line for line in cpu if line.startswith("torch")] == [TORCH]
    assert any(line.startswith("setuptools") for line in cpu) and any(line.startswith("uvicorn") for line in cpu)
    assert not any(line.startswith("pytest") for line in cpu)
    assert not any("+cpu" in line for line in packages.requirements(ROOT, "cuda", ["server", "test"]))


def test_an_extra_that_is_none_is_named() -> None:
    with pytest.raises(Failed, match=r"^EXTRAS has 'tests', which is no extra of pyproject.toml: use cpu, .*test"):
        packages.requirements(ROOT, "cpu", ["server", "tests"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_project_is_built_again_without_an_index(tool: Tool, device: str, tmp_path: Path) -> None:
    compiled = tmp_path / "kernels/kda_kernels/cpu"
    compiled.mkdir(parents=True)
    (compiled / "_kda.abi3.so").touch()
    steps = FakeSteps()
    packages.install_project(steps, tool, tmp_path, device)
    [command] = steps.commands
    assert {"--no-index", "--no-deps", "--no-build-isolation", "--verbose"} <= set(command.split())
    assert ("--reinstall" in command, "./deploy/cpu-alias" in command) == (tool.name == "uv", device == "cpu")
    assert command.endswith("--editable .") and not list(compiled.iterdir())


def test_kernels_that_do_not_compile_are_told(tool: Tool, tmp_path: Path, capsys) -> None:
    (tmp_path / "kernels/kda_kernels/cpu").mkdir(parents=True)
    (tmp_path / "kernels/kda_kernels/cpu/kda.c").touch()
    packages.install_project(FakeSteps(), tool, tmp_path, "cuda")
    assert capsys.readouterr().out == "The C kernels did not compile, so slower ones will be used; log says why.\n"
