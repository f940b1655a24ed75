"""What a step that only decodes leaves out, and which steps leave out nothing."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

from vllm_kimi_linear.model_state import KimiLinearModelState

BLOCK = 256
Calls = list[tuple[str, Any]]
LATENTS_SPEC = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=576, dtype=torch.float32)
KDA_SPEC = MambaSpec(block_size=BLOCK, shapes=((4, 4),), dtypes=(torch.float32,), mamba_type="kda_attention")
LATENTS, KDA = SimpleNamespace(kv_cache_spec=LATENTS_SPEC), SimpleNamespace(kv_cache_spec=KDA_SPEC)
GROUPS: Any = [[LATENTS], [KDA], [KDA]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What vLLM's own class was asked for, and what of it."""
    found: Calls = []

    def begin(self: Any, vllm_config: Any, *args: Any) -> None:
        self._align_mode = vllm_config.cache_config.mamba_cache_mode == "align"
        indices = SimpleNamespace(
            compute_aligned_state_indices=lambda seq_lens, requests: found.append(("indices", requests))
        )
        self._mamba_ctx = indices

    monkeypatch.setattr(MambaHybridModelState, "__init__", begin)
    monkeypatch.setattr(
        MambaHybridModelState, "prepare_attn", lambda self, *args, **more: found.append(("metadata", args[4]))
    )
    for name in ("preprocess_state", "postprocess_state", "initialize_kv_cache"):
        monkeypatch.setattr(
            MambaHybridModelState, name, lambda self, *args, name=name, **more: found.append((name, None))
        )
    return found


def state(drafts: int = 0, mode: str = "align", connector: Any = None, **additional: Any) -> KimiLinearModelState:
    return KimiLinearModelState(
        SimpleNamespace(
            num_speculative_tokens=drafts,
            cache_config=SimpleNamespace(mamba_cache_mode=mode),
            kv_transfer_config=connector,
            additional_config=additional,
            lora_config=None,
            model_config=SimpleNamespace(enable_prompt_embeds=False),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1
            ),
        )
    )


def batch(computed: list[int], scheduled: list[int] | None = None, has_prefill: bool = False) -> Any:
    return SimpleNamespace(
        has_prefill=has_prefill,
        num_computed_tokens_np=np.array(computed, np.int32),
        num_scheduled_tokens=np.array(scheduled or [1] * len(computed), np.int32),
        seq_lens=None,
        num_reqs_after_padding=8,
    )


def prepare(
    model_state: KimiLinearModelState,
    calls: Calls,
    has_prefill: bool = False,
    mode: CUDAGraphMode = CUDAGraphMode.FULL,
    **more: Any,
) -> Calls:
    calls.clear()
    model_state.prepare_attn(batch([300], has_prefill=has_prefill), mode, (), None, GROUPS, None, **more)
    return calls


def test_a_replayed_step_of_decodes_takes_no_metadata_of_kda_layers(calls: Calls) -> None:
    offloading = SimpleNamespace(kv_connector="OffloadingConnector")
    for ours in (state(), state(connector=offloading)):
        assert prepare(ours, calls) == [("indices", 8), ("metadata", [[LATENTS], [], []])]


def test_every_other_step_takes_all_of_it(calls: Calls) -> None:
    whole = [("metadata", GROUPS)]
    assert prepare(state(), calls, for_capture=True) == whole
    assert prepare(state(), calls, has_prefill=True) == whole
    assert prepare(state(), calls, mode=CUDAGraphMode.PIECEWISE) == whole
    other_connector = SimpleNamespace(kv_connector="NixlConnector")
    for other in (state(drafts=2), state(mode="none"), state(connector=other_connector), state(check_states=True)):
        assert prepare(other, calls) == whole


def test_the_next_step_can_follow_from_a_replayed_step_of_decodes(calls: Calls) -> None:
    ours = state()
    prepare(ours, calls)
    assert ours.prepared is not None and ours.prepared.batch.num_reqs_after_padding == 8
    others: list[dict[str, Any]] = [{"for_capture": True}, {"has_prefill": True}, {"mode": CUDAGraphMode.NONE}]
    for other in others:
        ours.prepared = ours.last_step = object()  # type: ignore[assignment]
        prepare(ours, calls, **other)
        assert ours.prepared is ours.last_step is None, "its buffers hold another step's"


@pytest.mark.parametrize("wrapped", [False, True], ids=["as the scheduler has it", "as a worker has it"])
def test_the_group_whose_tokens_have_slots(wrapped: bool, calls: Calls) -> None:
    """A worker's groups hold the specs of their layers, one by one."""
    table = SimpleNamespace(gpu=SimpleNamespace(is_cuda=False))
    tables = SimpleNamespace(block_tables=[table] * 3, block_sizes=[BLOCK] * 3)

    def groups(kinds: str) -> Any:
        specs = [{"state": KDA_SPEC, "latents": LATENTS_SPEC}[kind] for kind in kinds.split()]
        layers = [{f"{index}": spec} for index, spec in enumerate(specs)]
        of_layers = [
            UniformTypeKVCacheSpecs.from_specs(one) if wrapped else spec
            for one, spec in zip(layers, specs, strict=True)
        ]
        named = [KVCacheGroupSpec([*one], spec) for one, spec in zip(layers, of_layers, strict=True)]
        return SimpleNamespace(kv_cache_groups=named)

    for kinds, kv_cache_group in (("state latents state", 1), ("state", None), ("latents state latents", None)):
        for mode in ("align", "none"):  # with a prefix cache and without
            ours = state(mode=mode)
            ours.last_step = object()  # type: ignore[assignment]
            ours.initialize_kv_cache(groups(kinds), tables)
            assert (ours.kv_cache_group, ours.last_step) == (kv_cache_group, None)
            assert ours.block_size == BLOCK
    off = state(steady_steps=False)
    off.initialize_kv_cache(groups("state latents"), tables)
    assert off.kv_cache_group is None and not off.steady_steps


@pytest.mark.parametrize(
    ("computed", "moves"),
    [
        ([1], False),
        ([BLOCK - 1], False),  # the block's last token
        ([BLOCK], True),  # the first of the next
        ([BLOCK + 1, 3 * BLOCK - 1], False),
        ([5, 7, 2 * BLOCK], True),
    ],
)
def test_states_move_only_into_a_new_block(calls: Calls, computed: list[int], moves: bool) -> None:
    ours = state()
    ours.block_size = BLOCK
    ours.preprocess_state(batch(computed), (), None, None)
    assert calls == [("preprocess_state", None)] * moves


def test_states_may_move_in_a_prefill_and_with_drafts(calls: Calls) -> None:
    state().preprocess_state(batch([5], [9], has_prefill=True), (), None, None)
    state(drafts=2).preprocess_state(batch([5], [3]), (), None, None)
    assert calls == [("preprocess_state", None)] * 2


def test_nothing_is_left_behind_a_step_but_with_drafts(calls: Calls) -> None:
    state().postprocess_state(None, None)
    assert not calls
    state(drafts=1).postprocess_state(None, None)
    assert calls == [("postprocess_state", None)]


def test_vllm_has_what_this_takes() -> None:
    vllms = inspect.signature(MambaHybridModelState.prepare_attn).parameters
    ours = inspect.signature(KimiLinearModelState.prepare_attn).parameters
    assert list(vllms)[: len(ours) - 1] == list(ours)[:-1]
    names = list(inspect.signature(KimiLinearModelState.preprocess_state).parameters)
    assert names == list(inspect.signature(MambaHybridModelState.preprocess_state).parameters)
    taken = inspect.signature(MambaSpecDecodeGPUContext.compute_aligned_state_indices).parameters
    assert list(taken) == ["self", "seq_lens", "num_reqs"]
