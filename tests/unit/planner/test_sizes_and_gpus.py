"""Numbers as people write them, and the machine that is named or found."""

from pathlib import Path

import pytest

from kimi_server.planner import gpus, nvidia, sizes
from kimi_server.planner.remedies import OTHERS
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
    with pytest.raises(ConfigError, match="--gpus is 'a100'; give one of A100-40GB, A100-80GB, or in place of"):
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
    with pytest.raises(ConfigError, match=r"--gpus is '2xH1000'; give one of A10, .* a size, such as 2x24GB"):
        gpus.machine(None, "2xH1000", None, 1)
    machine = gpus.machine(None, "2xH1000", "100G", 1)
    assert (machine.name, machine.count, machine.total) == ("H1000", 2, 100 * GIB)


NO_GPUS = (
    *("0xH200", "", "x", "4x", f"{'9' * 5000}xH200", "2x", "x24", "-1xH100", "1.5xH100", "2*H100", "2,H100"),
    *("2 H100", "H100x2", "H100 x 2", "L40Sx2", "H1000x2", "H100x", "xH100", "2xxH100", "2x2xH100", "24GBx2"),
    *("2x24", "2x4080", "4080", "0", "00", "0x24GB", "2x0GB", "2x24TB", "2x1.5GB", "cpu", "ALL", "none", "H100,H100"),
)


@pytest.mark.parametrize("memory", [None, "24G"])
@pytest.mark.parametrize("text", NO_GPUS)
def test_what_names_no_gpu_is_refused(text: str, memory: str | None) -> None:
    """With a memory any text was the name of a GPU."""
    with pytest.raises(ConfigError, match=r"^--gpus is ") as error:
        gpus.machine(None, text, memory, 1)
    assert ";" in str(error.value)


@pytest.mark.parametrize("name", ["ANY", "GB10", "H100-MIG", "MI300X", "GTX 1080", "RTX 4080", "RTX4080", "Max 1550"])
def test_a_gpu_that_is_not_known_has_a_name(name: str) -> None:
    machine = gpus.machine(None, f"2x{name}", "24G", 1)
    assert (machine.name, machine.count, machine.total) == (name, 2, 24 * GIB)


# Text -> number, name and MiB of the GPUs.
SIZES = {
    "2x24GB": (2, "24 GB", 23028),  # that of an A10
    "24GB": (1, "24 GB", 23028),
    "2x24G": (2, "24 GiB", 24576),
    "2x24GiB": (2, "24 GiB", 24576),
    " 2 X 24 gib ": (2, "24 GiB", 24576),
    "2x24564MiB": (2, "24564 MiB", 24564),
    "3x20gb": (3, "20 GB", 20 * 10**9 / MIB),  # of which no GPU is known
}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_in_place_of_a_name(text: str) -> None:
    count, name, mib = SIZES[text]
    machine = gpus.machine(None, text, None, 1)
    assert (machine.device, machine.count, machine.name) == ("cuda", count, name)
    assert (machine.total, machine.capability) == (mib * MIB, None)
    again = gpus.machine(None, f"{count}x{machine.short}", None, 1)  # as the answer shows it
    assert again == machine
    with pytest.raises(ConfigError, match=r"which says their memory; leave --memory out"):
        gpus.machine(None, text, "24G", 1)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in OTHERS.items() if name[0].isdigit()])
def test_a_size_is_what_an_answer_means_by_it(name: str, kind: str) -> None:
    assert gpus.machine(None, f"2x{name}", None, 1).total == gpus.of_kind(kind, 2).total


# GPU -> GB as its vendor says.
SOLD = {"A10": 24, "L4": 24, "RTX-4090": 24, "T4": 16, "L40S": 48, "H100-80GB": 80, "H200": 141, "RTX-5090": 32}


@pytest.mark.parametrize("short", SOLD)
def test_what_holds_for_a_size_holds_for_every_gpu_sold_as_that(short: str) -> None:
    machine = gpus.machine(None, f"{SOLD[short]}GB", None, 1)
    assert SOLD[short] * 10**9 <= machine.total <= gpus.GPUS[short].mib * MIB


def test_a_number_alone_is_a_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    any_kind = gpus.machine(None, "2", "24G", 1)
    assert (any_kind.count, any_kind.name, any_kind.total) == (2, "24 GiB", 24 * GIB)
    assert gpus.machine(None, "2", f"{24 * GIB}", 1).short == "24576 MiB"
    monkeypatch.setattr(nvidia, "probe", lambda: [nvidia.Gpu("NVIDIA H200", 143771 * MIB, "143771")] * 4)
    assert gpus.machine(None, "2", None, 1) == gpus.of_kind("H200", 2)
    monkeypatch.setattr(nvidia, "probe", list)
    with pytest.raises(ConfigError, match=r"--gpus is '2', a number, .* no GPU; give .* 2xH100-80GB or 2x24GB"):
        gpus.machine(None, "2", None, 1)


def test_memory_has_the_same_units() -> None:
    assert gpus.machine(None, "New", "24GB", 1).total == 23028 * MIB
    assert gpus.machine("cpu", None, "24GB", 1).total == 24 * 10**9
    assert gpus.machine("cpu", None, "24GiB", 1).total == gpus.machine("cpu", None, "24G", 1).total == 24 * GIB


def test_half_of_what_is_free_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "available_memory", lambda: 16 * GIB)
    said = "half of the 16.00 GiB that are free; the rest is left to the processes"
    assert f"CPU, 8.00 GiB for a rank ({said}" in gpus.machine("cpu", None, None, 1).describe()
    assert f"4.00 GiB for a rank (together {said}" in gpus.machine("cpu", None, None, 2).describe()
    assert gpus.machine("cpu", None, "8G", 1).describe() == "CPU, 8.00 GiB for a rank"


def test_a_container_has_no_more_than_its_limit(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemAvailable:    42 kB\n")
    for text, free in (("1024\n", 1024), ("max\n", 42 * 1024), ("9999999\n", 42 * 1024)):
        limit.write_text(text)
        assert gpus.available_memory(meminfo, limit) == free


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
