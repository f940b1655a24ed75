"""The first line of a plan: yes with what to run, or no with what would do. Each was read by a person."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_server.cli import main
from kimi_server.planner.checkpoints import KNOWN, read_config
from kimi_server.planner.gpus import machine
from kimi_server.planner.plan import Choice, Request, choose
from kimi_server.planner.remedies import remedies
from kimi_server.planner.stored import CAPABILITIES, STORED, as_stored

K, M = 1 << 10, 1 << 20
MODEL = next(iter(KNOWN))
CONFIG = read_config(MODEL)
SERVE = f"kimi-linear serve {MODEL}"
TRUST = "-- --trust-remote-code"
# Machine and context: the first line.
WHERE = "docs/guide/quantised-checkpoints.md says where to get such a checkpoint."
ANSWERS = {
    "1xH200 128K": f"Yes: 27 documents of 128K at once. Run: {SERVE} --context 128K {TRUST}",
    "B200 1M": f"Yes: 7 documents of 1M at once. Run: {SERVE} --context 1M {TRUST}",
    "2xh100 1M": f"Yes: 2 documents of 1M at once. Run: {SERVE} --tensor-parallel 2 --context 1M {TRUST}",
    "4xA100-80GB 1M": f"Yes: 5 documents of 1M at once. Run: {SERVE} --tensor-parallel 4 --context 1M {TRUST}",
    "8xL4 128K": f"Yes: 6 documents of 128K at once. Run: {SERVE} --tensor-parallel 8 --context 128K {TRUST}",
    "3xH100 1M": (
        f"Yes: 2 documents of 1M at once, on 2 of the 3 GPUs. Run: CUDA_VISIBLE_DEVICES=0,1 {SERVE} "
        f"--tensor-parallel 2 --context 1M {TRUST}"
    ),
    "7xA6000 128K": (
        f"Yes: 17 documents of 128K at once, on 4 of the 7 GPUs. Run: CUDA_VISIBLE_DEVICES=0,1,2,3 {SERVE} "
        f"--tensor-parallel 4 --context 128K {TRUST}"
    ),
    "6xH100 128K": "Yes: 63 documents of 128K at once, by 3 servers of 2 ranks. Run:",
    "8xH200 1M": "Yes: 36 documents of 1M at once, by 4 servers of 2 ranks. Run:",
    "H100 1M": (
        "No: 1 document of 1M does not fit on 1 x H100-80GB. It needs 2 x H100-80GB, 1 x H200, 4 x 48 GB, or "
        "--weights fp8 (50 GB) or the int4 checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
    "A100-80GB 128K": (
        "No: 1 document of 128K does not fit on 1 x A100-80GB. It needs 2 x A100-80GB, 1 x H200, 4 x 48 GB, or the "
        "int4 checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
    "L40S 128K": (
        "No: 1 document of 128K does not fit on 1 x L40S. It needs 4 x L40S, 2 x 80 GB, 1 x H200, or the int4 "
        "checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
    "2xL40S 128K": (
        "No: 1 document of 128K does not fit on 2 x L40S. It needs 4 x L40S, 2 x 80 GB, 1 x H200, or "
        "--weights fp8 (50 GB) or the int4 checkpoint (31 GB) on these GPUs. "
        f"{WHERE}"
    ),
    "rtx-a6000 128K": (
        "No: 1 document of 128K does not fit on 1 x A6000. It needs 4 x A6000, 2 x 80 GB, 1 x H200, or the int4 "
        "checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
    "RTX-4090 128K": (
        "No: 1 document of 128K does not fit on 1 x RTX-4090. It needs 8 x RTX-4090, 2 x 80 GB, 1 x H200, 4 x 48 GB, "
        "--weights fp8 (50 GB) on 4 x RTX-4090, or the int4 checkpoint (31 GB) on 2 x RTX-4090. "
        f"{WHERE}"
    ),
    "2xRTX-4090 128K": (
        "No: 1 document of 128K does not fit on 2 x RTX-4090. It needs 8 x RTX-4090, 2 x 80 GB, 1 x H200, 4 x 48 GB, "
        "or the int4 checkpoint (31 GB) on these GPUs. "
        f"{WHERE}"
    ),
    "4x3090 128K": (
        "No: 1 document of 128K does not fit on 4 x RTX-3090. It needs 8 x RTX-3090, 2 x 80 GB, 1 x H200, 4 x 48 GB, "
        "or the int4 checkpoint (31 GB) on these GPUs. "
        f"{WHERE}"
    ),
    "2xRTX-5090 128K": (
        "No: 1 document of 128K does not fit on 2 x RTX-5090. It needs 4 x RTX-5090, 2 x 80 GB, 1 x H200, 4 x 48 GB, "
        "or --weights fp8 (50 GB) or the int4 checkpoint (31 GB) on these GPUs. "
        f"{WHERE}"
    ),
    "A100-40GB 1M": (
        "No: 1 document of 1M does not fit on 1 x A100-40GB. It needs 4 x A100-40GB, 2 x 80 GB, 1 x H200, 4 x 48 GB, "
        "or the int4 checkpoint (31 GB) on 2 x A100-40GB. "
        f"{WHERE}"
    ),
    "RTX-PRO-6000 128K": (
        "No: 1 document of 128K does not fit on 1 x RTX-PRO-6000. It needs 2 x RTX-PRO-6000, 2 x 80 GB, 1 x H200, "
        "4 x 48 GB, or --weights fp8 (50 GB) or the int4 checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
}
# Other arguments: the first line.
OTHERS = {
    "--gpus 4xH100 --concurrency 8": (
        "No: 8 documents of 1M do not fit on 4 x H100-80GB, 5 do. Yes: 11 documents of 512K at once, with --context "
        "512K. 8 documents of 1M need 8 x H100-80GB, 2 x H200, or --weights fp8 (50 GB) or the int4 checkpoint (31 GB) "
        f"on these GPUs. {WHERE} Here --concurrency 5, or --decode-context-parallel 4 (without prefix caching) fits."
    ),
    "--gpus 4xH100 --concurrency 8 --context 1M": (
        "No: 8 documents of 1M do not fit on 4 x H100-80GB, 5 do. They need 8 x H100-80GB, 2 x H200, or --weights fp8 "
        f"(50 GB) or the int4 checkpoint (31 GB) on these GPUs. {WHERE} Here --concurrency 5, --context 762240, or "
        "--decode-context-parallel 4 (without prefix caching) fits."
    ),
    "--gpus 8xB200 --concurrency 500": (
        "No: 500 documents of 1M do not fit on 8 x B200, 56 do. Yes: 864 documents of 64K at once, with --context 64K. "
        "No machine of up to 8 known GPUs holds 500 documents of 1M. Here --concurrency 56 fits."
    ),
    "--gpus 8xB200 --concurrency 500 --context 1M": (
        "No: 500 documents of 1M do not fit on 8 x B200, 56 do. No machine of up to 8 known GPUs holds that. "
        "Here --concurrency 56, or --context 112960 fits."
    ),
    "--gpus 8xL4": (
        "No: 1 document of 1M does not fit on 8 x L4. Yes: 1 document of 512K at once, with --context 512K. 1 document "
        "of 1M needs 2 x 80 GB, 1 x H200, 4 x 48 GB, or --weights fp8 (50 GB) or the int4 checkpoint (31 GB) on these "
        f"GPUs. {WHERE} Here --decode-context-parallel 8 (without prefix caching) fits."
    ),
    "--gpus 2x24GB --context 128K": (
        "No: 1 document of 128K does not fit on 2 x 24 GB. It needs 8 x 24 GB, 2 x 80 GB, 1 x H200, 4 x 48 GB, or the "
        f"int4 checkpoint (31 GB) on these GPUs. {WHERE}"
    ),
    "--gpus 8x24GB --context 128K": (
        f"Yes: 6 documents of 128K at once. Run: {SERVE} --tensor-parallel 8 --gpus 8x24GB --context 128K {TRUST}"
    ),
    "--gpus 8 --memory 24G --context 128K": (
        f"Yes: 7 documents of 128K at once. Run: {SERVE} --tensor-parallel 8 --gpus 8x24GiB --context 128K {TRUST}"
    ),
    "--gpus New --memory 70G": (
        "No: 1 document of 1M does not fit on 1 x New. It needs 2 x New, 2 x 80 GB, 1 x H200, 4 x 48 GB, or "
        "--weights fp8 (50 GB, from compute capability 8.9 on) or the int4 checkpoint (31 GB) on this GPU. "
        f"{WHERE}"
    ),
    "--gpus 2xNew --memory 70G": (
        f"Yes: 1 document of 1M at once. Run: {SERVE} --tensor-parallel 2 --gpus 2xNew --memory 70G --context 1M "
        f"{TRUST}"
    ),
    "--gpus H100 --weights fp8 --context 128K": (
        f"Yes: 18 documents of 128K at once. Run: {SERVE} --context 128K --weights fp8 {TRUST}"
    ),
    "--gpus H100 --weights int4 --context 128K": (
        "Yes: 34 documents of 128K at once, with an int4 checkpoint (docs/guide/quantised-checkpoints.md). Run: "
        f"kimi-linear serve Kimi-Linear-48B-A3B-Instruct-int4 --context 128K {TRUST}"
    ),
    "--gpus 2x4090 --weights fp8": (
        "No: 1 document of 1M does not fit on 2 x RTX-4090. It needs 8 x RTX-4090, 1 x H100-80GB, 1 x H200, 2 x L40S, "
        "or the int4 checkpoint (31 GB) on 4 x RTX-4090. "
        f"{WHERE}"
    ),
    "--device cpu --memory 256G --context 128K": (
        f"Yes: 146 documents of 128K at once. Run: {SERVE} --device cpu --memory 256G --context 128K {TRUST}"
    ),
    "--device cpu --memory 40G": (
        "No: 1 document of 1M does not fit on a CPU that may use 40.00 GiB. It needs --memory 101G, --memory 56G and "
        "the fp8 checkpoint (50 GB), or the int4 checkpoint (31 GB). "
        f"{WHERE}"
    ),
    "--device cpu --memory 16G --tensor-parallel 2 --context 128K": (
        "No: 1 document of 128K does not fit on 2 ranks of a CPU that may use 16.00 GiB each. It needs --memory 48G, "
        "--memory 25G and the fp8 checkpoint (50 GB), or --memory 17G and the int4 checkpoint (31 GB). "
        f"{WHERE}"
    ),
}
LINES = {"--gpus {} --context {}".format(*key.split()): line for key, line in ANSWERS.items()}


@pytest.mark.parametrize(("arguments", "line"), (LINES | OTHERS).items())
def test_the_first_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", MODEL, "--brief", *arguments.split()]) == (0 if line.startswith("Yes") else 1)
    out, error = capsys.readouterr()
    first, *commands = out.splitlines()
    assert (first, error) == (line, "")
    assert bool(commands) == line.endswith("Run:")
    assert all(each.startswith("  CUDA_VISIBLE_DEVICES=") for each in commands)


def short(gpus: str | None, memory: str | None = None, context: int = 128 * K, **more: Any) -> Choice:
    request = Request(config=CONFIG, context=context, concurrency=1, dtype="bfloat16", **more)
    return choose(request, machine(None if gpus else "cpu", gpus, memory, 1))


@pytest.mark.parametrize("gpus", ["H100", "A6000", "2x4090", "RTX-4090", None])
def test_every_remedy_fits_and_no_smaller_one_would(gpus: str | None) -> None:
    refused = short(gpus, None if gpus else "16G")
    found = remedies(refused)
    assert not refused.fits
    assert found
    for each in found:
        assert each.choice.fits, each.name
        place = each.choice.machine
        if gpus is None:
            less = place.usable - (1 << 30)
            assert not choose(each.choice.request, replace(place, usable=less)).fits
        elif place != refused.machine and place.count > 1:
            assert not choose(each.choice.request, replace(place, count=place.count // 2)).fits


def test_a_remedy_is_what_a_plan_of_it_says() -> None:
    """`--weights` plans the checkpoint that is offered."""
    found = {each.weights: each.choice for each in remedies(short("H100")) if each.weights}
    assert found.keys() == STORED.keys()
    for weights, choice in found.items():
        asked = choose(
            replace(short("H100").request, config=as_stored(CONFIG, weights)), machine(None, "H100", None, 1)
        )
        assert asked.best == choice.best


GUIDE = (Path(__file__).parents[3] / "docs/guide/planner.md").read_text()
ROWS = re.findall(r"^\| ([\w-]+) \| (\d+) \| ?(\d*) \| (\d+) \|$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_guide_says_what_fits_on_small_machines(row: tuple[str, ...]) -> None:
    """Nothing stands where the GPU does not compute with such weights."""
    gpus, *shown = row
    place = machine(None, gpus, None, 1)
    for count, weights in zip(shown, (None, *STORED), strict=True):
        config = as_stored(CONFIG, weights) if weights else CONFIG
        offered = weights is None or (place.capability or (0, 0)) >= CAPABILITIES[weights]
        fitting = choose(replace(short(gpus).request, config=config), place).best.sequences(128 * K)
        assert count == (str(fitting) if offered else "")


def test_the_guide_shows_the_answers() -> None:
    assert len(ROWS) == 5
    for case in ("1xH200 128K", "2xRTX-4090 128K"):
        assert f"    {ANSWERS[case]}\n" in GUIDE
    assert f"    {OTHERS['--gpus 8xL4']}\n" in GUIDE


def test_the_guide_shows_the_tables_as_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", MODEL, "--gpus", "4xH100-80GB", "--context", "1M", "--concurrency", "5"]) == 0
    printed = re.findall(r"^  ([\w ]+?)(?:, \w+)?  +(\d+\.\d{3}) ", capsys.readouterr().out, re.MULTILINE)
    parts = re.findall(r"^\| ([\w ]+) \| (\d+\.\d{3}) \|", GUIDE, re.MULTILINE)
    assert len(parts) == 7 and set(parts) <= set(printed)
    assert main(["plan", MODEL, "--gpus", "2xRTX-4090", "--context", "128K"]) == 1
    lines = [line.replace(",", "").replace("GiB", "").split() for line in capsys.readouterr().out.splitlines()]
    shown = re.findall(r"^\|.* servers? of .*\|$", GUIDE, re.MULTILINE)
    rows = [row.replace(",", "").replace("|", "").split() for row in shown]
    assert len(rows) == 5 and all(row in lines for row in rows)


def test_a_cpu_hears_no_word_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    for memory, status in (("32G", 1), ("256G", 0)):
        assert main(["plan", MODEL, "--device", "cpu", "--memory", memory]) == status
        assert "GPU" not in "".join(capsys.readouterr()).upper().replace("--GPU", "")
    assert main(["serve", MODEL, "--device", "cpu", "--memory", "32G"]) == 1
    assert "GPU" not in capsys.readouterr().err


def test_the_table_follows_the_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", MODEL, "--gpus", "H100", "--context", "128K"])
    first, empty, *_, table, note = capsys.readouterr().out.replace("\n\n", "\n\n\f").split("\f")
    assert first.startswith("No: ") and "Short: each rank of 1 server of 1 rank needs 95.88 GiB" in empty
    assert [line.split()[:2] for line in table.splitlines()[1:6]] == [
        *(["2", "x"], ["1", "x"], ["4", "x"]),
        *(["--weights", "fp8,"], ["--weights", "int4,"]),
    ]
    assert "--weights" in note


def test_json_has_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", MODEL, "--gpus", "H100", "--json"]) == 1
    no = json.loads(capsys.readouterr().out)
    assert (no["fits"], no["answer"]) == (False, ANSWERS["H100 1M"])
    assert no["shorter"] is None
    assert no["memory"]["short"] > no["memory"]["cache"] > 0
    assert [(each["weights"], each["machine"], each["sequences"][str(M)]) for each in no["remedies"]] == [
        *((None, "2 x H100-80GB", 2), (None, "1 x H200", 3), (None, "4 x 48 GB", 1)),
        *(("fp8", "1 x H100-80GB", 2), ("int4", "1 x H100-80GB", 4)),
    ]
    out = tmp_path / "serve.yaml"
    assert main(["plan", MODEL, "--gpus", "2xH100", "--json", "--out", str(out)]) == 0
    yes = json.loads(capsys.readouterr().out)
    assert (yes["fits"], yes["answer"]) == (True, "Yes: 2 documents of 1M at once.")
    assert yes["commands"] == [f"vllm serve --config {out} --trust-remote-code --port 8000"]
    assert yes["sequences"][str(M)] == 2
    assert yes["flags"]["tensor-parallel-size"] == yes["tensor_parallel"] == 2
    assert out.exists()


def test_a_plan_without_a_length_says_the_longest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for with the flag that the answer names, it is a yes of as many; the next is a no."""
    for flags in (["--gpus", "8xL4"], ["--gpus", "4xH100", "--concurrency", "8"], ["--gpus", "6xL40S"]):
        assert main(["plan", MODEL, *flags, "--brief"]) == (0 if "6xL40S" in flags else 1)
        line = capsys.readouterr().out
        if found := re.search(r"Yes: (\d+ documents? of (\d+)K at once), with (--context) (\2K)\.", line):
            assert main(["plan", MODEL, *flags, "--brief", *found.groups()[2:]]) == 0
            assert capsys.readouterr().out.startswith(f"Yes: {found[1]}")
            assert main(["plan", MODEL, *flags, "--brief", "--context", f"{2 * int(found[2])}K"]) == 1
            assert "Yes" not in capsys.readouterr().out  # who asks for a length is answered for that one
        assert bool(found) == ("6xL40S" not in flags)
    assert main(["plan", MODEL, "--gpus", "8xL4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["shorter"] == {"context": 512 * K, "sequences": 1}
