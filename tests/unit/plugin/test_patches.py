"""Every patch finds what it patches in each supported vLLM, is said in full, and does what it says."""

import dataclasses
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm import version
from vllm.platforms import current_platform

from tests import patches_page
from tests.support.vllm_sources import Sources, fits
from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.attention import mla_splits
from vllm_kimi_linear.patches import all as patches
from vllm_kimi_linear.patches import cpu_polling
from vllm_kimi_linear.patches import patch as patch_module
from vllm_kimi_linear.patches.patch import PATCHED, Hook, Patch
from vllm_kimi_linear.patches.when_loaded import when_loaded
from vllm_kimi_linear.supported import versions
from vllm_kimi_linear.supported.install_check import SERIES

# What every hook's target takes in the sources of a vLLM: written by `python -m tests.newer_vllm --record`.
RECORDS = Path(__file__).with_name("hooks")

PATCHES = patches.patches()


@pytest.mark.parametrize("name", PATCHES)
def test_hooks_fit_the_installed_vllm(name: str) -> None:
    sources = Sources(Path(str(vllm.__file__)).parent)
    if versions.series() in PATCHES[name].versions:
        for hook in PATCHES[name].hooks:
            assert fits(hook.parameters, sources.parameters(hook.target)), hook


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("name", PATCHES)
def test_hooks_fit_every_supported_vllm(name: str, series: str) -> None:
    record = json.loads((RECORDS / f"{series}.json").read_text())
    if series in PATCHES[name].versions:
        for hook in PATCHES[name].hooks:
            assert fits(hook.parameters, record[hook.target]), hook


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_says_what_it_is_for(name: str) -> None:
    patch = PATCHES[name]
    assert set(patch.versions) <= set(SERIES)
    for text in (patch.symptom, patch.cause, patch.upstream, patch.remove_when):
        assert text.endswith(".")
    assert name.startswith("patches.") or patch.speed, "what is no speed-up stands among the patches"


@pytest.mark.parametrize(
    ("expected", "found", "right"),
    [
        ("a b", "a b", True),
        ("a b", "a b c", False),
        ("a ...", "a b c", True),
        ("a ...", "a", True),
        ("a ...", "ab", False),
        ("... b ... d", "a b c d", True),
        ("... b ... d", "a d", False),
        ("", "", True),
        ("", None, False),
        ("...", "", True),
    ],
)
def test_parameters_that_fit(expected: str, found: str | None, right: bool) -> None:
    assert fits(expected, found) is right


def test_what_the_sources_do_not_have() -> None:
    sources = Sources(Path(str(vllm.__file__)).parent)
    assert sources.parameters("vllm.v1.core.sched.scheduler:Scheduler.schedules") is None
    assert sources.parameters("vllm.v1.core.sched.scheduler:schedule") is None
    assert sources.parameters("vllm.v1.core.no_such_module:schedule") is None


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], ModuleType]:
    """Imports a module that nobody has imported before."""
    (tmp_path / "made_up_module.py").write_text(
        "def f(x):\n    return x\n\nclass C:\n    @classmethod\n    def g(cls, x):\n        return cls, x\n\n"
        "class D(C):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_up_module", raising=False)

    def load() -> ModuleType:
        import made_up_module

        return made_up_module

    return load


def doubled(original: Callable) -> Callable:
    def replacement(*args: Any) -> Any:
        return 2 * original(*args) if len(args) == 1 else (original(*args)[0], 2 * original(*args)[1])

    return replacement


MADE_UP = Patch(
    symptom="",
    cause="",
    upstream="",
    remove_when="",
    hooks=(Hook("made_up_module:f", "x", doubled), Hook("made_up_module:C.g", "cls x", doubled)),
)


@pytest.mark.parametrize("first", ["patch", "module"])
def test_a_patch_does_not_depend_on_the_order_of_imports(module: Callable[[], ModuleType], first: str) -> None:
    if first == "module":
        module()
    MADE_UP.apply()
    MADE_UP.apply()
    loaded = module()
    assert loaded.f(3) == 6
    assert loaded.C.g(3) == (loaded.C, 6)
    assert loaded.D.g(3) == (loaded.D, 6)
    assert getattr(loaded.f, PATCHED)(3) == 3
    assert loaded.f.__name__ == "f"


def test_a_patch_that_knows_no_model_waits_until_the_process_serves_ours(
    module: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_module, "_serves_ours", False)
    dataclasses.replace(MADE_UP, scope="process", hooks=MADE_UP.hooks[:1]).apply()
    taken = module().f  # as by a table of functions that is made before anything is known
    assert taken(3) == 3
    patch_module.serve_ours()
    assert taken(3) == 6


@pytest.mark.parametrize(
    "process", ["vllm.v1.executor.uniproc_executor:UniProcExecutor", "vllm.v1.worker.worker_base:WorkerBase"]
)
@pytest.mark.parametrize("architecture", [ARCHITECTURE, "LlamaForCausalLM"])
def test_engines_and_workers_know_whom_they_serve(
    process: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_module, "_serves_ours", False)
    patches.apply()
    module, _, name = process.partition(":")
    config = SimpleNamespace(model_config=SimpleNamespace(architecture=architecture))
    with pytest.raises((AttributeError, TypeError)):  # it needs far more than that, later
        getattr(importlib.import_module(module), name)(config)
    assert patch_module._serves_ours is (architecture == ARCHITECTURE)


def test_what_is_never_loaded_is_waited_for() -> None:
    when_loaded("made_up_module_that_is_none", lambda module: pytest.fail("there is none"))
    with pytest.raises(ModuleNotFoundError):
        import made_up_module_that_is_none  # noqa: F401


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on a GPU machine polling takes no core from the work")
def test_waiting_processes_leave_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    cpu_polling.sleep(time.sleep)()
    assert naps == [cpu_polling.POLL_SECONDS]


def test_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "__version__", "0.99.0")
    monkeypatch.setattr(Patch, "apply", lambda patch: pytest.fail(f"{patch} was applied"))
    patches.apply()


@pytest.fixture
def parts() -> Callable[..., int]:
    """Into how many parts a step of so many tokens is cut, with graphs up to 128 tokens."""

    class Builder:
        max_num_splits = 32

        def _build_decode(self, num_decode_tokens: int) -> int:
            return self.max_num_splits

    build: Any = functools.wraps(Builder._build_decode)(mla_splits.split_contexts_of_few(Builder._build_decode))

    def parts(tokens: int, asked: int = 32, architecture: str = ARCHITECTURE, most: int = 32) -> int:
        builder: Any = Builder()
        builder.max_num_splits = most
        builder.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(architecture=architecture),
            attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=asked),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32, 64, 128]),
        )
        build(builder, num_decode_tokens=128)
        return build(builder, num_decode_tokens=tokens)

    return parts


def test_few_sequences_are_cut_into_more_parts(parts: Callable[..., int]) -> None:
    assert [parts(tokens) for tokens in (1, 8, 32, 33, 128)] == [128, 128, 128, 32, 32]


def test_parts_stay_as_they_are_where_somebody_chose_them(parts: Callable[..., int]) -> None:
    assert parts(1, asked=64, most=64) == 64
    assert parts(1, architecture="DeepseekV3ForCausalLM") == 32
    assert parts(1, most=0) == 0  # no graphs
    assert parts(1, most=1) == 1  # invariant batches


@pytest.mark.parametrize(
    ("graphs", "few"), [((1, 2, 4, 8), 8), ((1, 2, 4), 4), ((1, 2, 4, 8, 16, 24, 32), 8), ((512, 128, 1), 128), ((), 0)]
)
def test_a_step_counts_as_few_if_its_graph_does(graphs: tuple[int, ...], few: int) -> None:
    assert mla_splits.few_tokens(graphs) == few


def test_the_page_of_patches_is_made_from_them() -> None:
    page = Path(__file__).parents[3] / "docs" / "design" / "patches.md"
    assert page.read_text() == patches_page.page(), "run python -m tests.patches_page > docs/design/patches.md"
