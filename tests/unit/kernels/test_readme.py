"""The contract in kernels/README.md names what the interface has, no more and no less."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from decode_kernels import interface as decode_interface
from kda_kernels import interface

README = (Path(__file__).parents[3] / "kernels" / "README.md").read_text()
RECORDS = {
    name: record
    for name, record in vars(interface).items()
    if inspect.isclass(record) and is_dataclass(record) and record.__module__ == interface.__name__
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = re.split(r"^#+ ", README.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_record_has_a_table():
    assert re.findall(r"^### `(\w+)`$", README, flags=re.MULTILINE) == [
        *("KdaInputs", "KdaParams", "KdaState", "PrefillCheckpoints"),
        *("DecodeArgs", "PrefillArgs", "SpecDecodeArgs"),
    ]
    assert len(RECORDS) == 7


@pytest.mark.parametrize("name", RECORDS)
def test_a_table_names_the_fields_of_its_record(name):
    table, defined = rows(f"### `{name}`"), fields(RECORDS[name])
    assert [row[0] for row in table] == [f"`{field.name}`" for field in defined]
    for row, field in zip(table, defined, strict=True):
        assert ("optional" in row[-1]) == (field.default is not MISSING), field.name


def test_every_operation_stands_with_the_record_it_takes():
    operations = {row[0].strip("`"): row[1].strip("`") for row in rows("## The contract")}
    assert list(operations) == ["decode", "prefill", "spec_decode"]
    for operation, record in operations.items():
        (parameter,) = inspect.signature(getattr(interface, operation)).parameters.values()
        assert parameter.annotation is RECORDS[record]


def test_the_operations_of_a_decode_step_have_a_table():
    names = sorted(row[0].strip("`") for row in rows("## Decode steps"))
    assert names == sorted([*decode_interface.kernels("cpu").__all__, "all_reduce_add_norm"])
    pytest.importorskip("triton")
    assert names == [name for name in decode_interface.kernels("cuda").__all__ if name != "Workspace"]
