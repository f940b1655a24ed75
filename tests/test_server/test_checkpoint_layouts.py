"""Every layout of a checkpoint that is accepted answers as the reference does."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.own_process import in_own_process
from vllm_kimi_linear.demo import write_checkpoint
from vllm_kimi_linear.oracle import Oracle

# Layout -> what writes it.
LAYOUTS: dict[str, dict[str, Any]] = {
    "all MLA": {"preset": "all-mla"},
    "one MLA layer": {"preset": "one-mla"},
    "dense": {"preset": "dense"},
    "in shards": {"layers": 4, "shards": 3},
    "A_log as [H]": {"layers": 4},
}
PROMPT = list(range(100, 160))


def answer(models: dict[str, str]) -> dict[str, list[int]]:
    """Layout -> 24 greedy tokens from vLLM's engine, one after the other in this process."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = {}
    for name, model in models.items():
        engine = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
        )
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        [output] = engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        answers[name] = list(output.outputs[0].token_ids)
        del engine
        cleanup_dist_env_and_memory()
    return answers


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    paths = {name: folder / str(index) for index, name in enumerate(LAYOUTS)}
    for name, options in LAYOUTS.items():
        write_checkpoint(paths[name], **options)
    file = paths["A_log as [H]"] / "model.safetensors"
    tensors = {n: t.flatten() if n.endswith("A_log") else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return paths


@pytest.fixture(scope="module")
def answers(layouts: dict[str, Path]) -> dict[str, list[int]]:
    models = {name: str(path) for name, path in layouts.items()}
    return in_own_process(answer, models, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_answers_as_the_reference(layouts: dict[str, Path], answers: dict[str, list[int]], layout: str) -> None:
    model = layouts[layout]
    if layout == "A_log as [H]":  # the same values as in the usual shape, the only one the reference reads
        file = model / "model.safetensors"
        tensors = {n: t.view(1, 1, -1, 1) if n.endswith("A_log") else t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert len(answers[layout]) == 24
    score = Oracle(model).score(PROMPT, answers[layout])
    assert score.agrees
