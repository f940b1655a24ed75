"""Numbers as people write them, and the machine that is named or found."""

from pathlib import Path

import pytest

from kimi_server.planner import gpus, sizes
from vllm_kimi_linear.cache.layout import GIB, MIB
from vllm_kimi_linear.config.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("128K", 131072), ("1M", 1048576), ("1m", 1048576), (" 80g ", 80 * GIB)]
)
def test_sizes(text: str, number: int) -> None:
    assert sizes.parse("--context", text, "128K") == number


@pytest.mark.parametrize("text", ["0", "0K", "", "K", "-1", "1.5M", "1T", "1 M", "one", "\u0661", "9" * 5000])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        sizes.parse("--context", text, "128K")
    assert str(error.value) == f"--context is {text!r}; give a whole number from 1, such as 128K"


def test_tokens_are_shown_as_they_are_written() -> None:
    assert [sizes.tokens(count) for count in (4096, 131072, 1048576, 2000)] == ["4K", "128K", "1M", "2,000"]


@pytest.mark.parametrize("short", gpus.GPUS)
def test_a_gpu_has_two_names(short: str) -> None:
    name, mib, capability = gpus.GPUS[short]
    one, four = gpus.machine(None, name, None, 1), gpus.machine(None, f"4x{short.lower()}", None, 1)
    assert (one.device, one.name, one.count, one.total) == ("cuda", name, 1, mib * MIB)
    assert (four.name, four.count, four.total) == (name, 4, mib * MIB)
    assert one.usable == int(mib * MIB * gpus.GPU_SHARE)
    assert (one.short, one.capability) == (short, capability)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        *(("H100", "H100-80GB"), ("h100", "H100-80GB"), ("NVIDIA H100", "H100-80GB"), ("h100 80gb", "H100-80GB")),
        *(("RTX-4090", "RTX-4090"), ("rtx4090", "RTX-4090"), ("RTX 4090", "RTX-4090"), ("4090", "RTX-4090")),
        *(("RTX-A6000", "A6000"), ("rtx 6000 ada", "RTX-6000-Ada"), ("A100_40GB", "A100-40GB")),
    ],
)
def test_a_gpu_is_understood_as_people_write_it(text: str, short: str) -> None:
    for given, count in ((text, 1), (f"2x{text}", 2), (f"2 x {text}", 2)):
        assert gpus.machine(None, given, None, 1) == gpus.of_kind(short, count)


def test_a_name_of_two_sizes_is_asked_about() -> None:
    with pytest.raises(ConfigError, match="--gpus is 'a100'; give one of A100-40GB, A100-80GB, or what one GPU has"):
        gpus.machine(None, "a100", None, 1)


def test_no_two_gpus_have_one_name() -> None:
    names = [*gpus.GPUS, *gpus.ALIASES, *(kind.name for kind in gpus.GPUS.values())]
    owners = {
        gpus._letters(name): {gpus._kind(each) for each in names if gpus._letters(each) == gpus._letters(name)}
        for name in names
    }
    assert "" not in owners
    assert all(len(kinds) == 1 for kinds in owners.values())


def test_an_unknown_gpu_needs_its_memory() -> None:
    with pytest.raises(ConfigError, match=r"--gpus is '2xH1000'; give one of A10, .* with --memory 80G"):
        gpus.machine(None, "2xH1000", None, 1)
    machine = gpus.machine(None, "2xH1000", "100G", 1)
    assert (machine.name, machine.count, machine.total) == ("H1000", 2, 100 * GIB)


@pytest.mark.parametrize("text", ["0xH200", "", "x", "4x", f"{'9' * 5000}xH200"])
def test_what_names_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--gpus is ") as error:
        gpus.machine(None, text, None, 1)
    assert ";" in str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_without_its_letter(device: str) -> None:
    """A GPU of 1 byte was planned with, of any name."""
    with pytest.raises(ConfigError, match="--memory is '80', which means bytes; give a size such as 80G"):
        gpus.machine(device, None if device == "cpu" else "H100", "80", 1)


def test_memory_that_is_not_known_has_to_be_given(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    with pytest.raises(ConfigError, match=r"--memory is unset .* give it, such as 16G"):
        gpus.available_memory(file)
    file.write_text("MemTotal:       100 kB\nMemAvailable:    42 kB\n")
    assert gpus.available_memory(file) == 42 * 1024
