"""Every layout of a checkpoint that is accepted answers as the reference does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference
from tests.support.own_process import in_own_process

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


def saved_by_transformers(original: Path, folder: Path) -> None:
    """A checkpoint in the original layout, loaded and saved again, as every fine-tune is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(original, dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.up_proj.weight" in names  # else this tests nothing new


def by_torch_save(original: Path, folder: Path) -> None:
    """The same as older code wrote it: a pickle, in fp32 whatever the config says, with a buffer that nothing reads."""
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    config = json.loads((original / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t.float() for file in original.glob("*.safetensors") for n, t in load_file(file).items()}
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    torch.save(tensors, folder / "pytorch_model.bin")


# Layout -> what makes it of the one in shards, whose answers it gives.
REWRITTEN: dict[str, Callable[[Path, Path], None]] = {
    "saved by transformers": saved_by_transformers,
    "by torch.save": by_torch_save,
}
# Layout -> fields of a model that transformers makes and saves itself, in its own names for them.
MADE: dict[str, dict[str, Any]] = {
    "two dense layers, tied, in shards": {
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "tie_word_embeddings": True,
    },
    "no dense layer": {
        "mlp_layer_types": ["sparse"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def make(folder: Path, fields: dict[str, Any]) -> None:
    from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 64}
    experts = {"num_experts": 8, "num_experts_per_token": 2}
    special = {"bos_token_id": 1011, "eos_token_id": 1013, "pad_token_id": 1023}
    kinds = ["linear_attention", "full_attention"] * 2
    config = KimiLinearConfig(
        num_hidden_layers=4, layer_types=kinds, initializer_range=0.1, **sizes, **heads, **experts, **special, **fields
    )
    model = KimiLinearForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size="2MB")
    assert "linear_attn_config" not in json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    paths = {name: folder / str(index) for index, name in enumerate([*LAYOUTS, *REWRITTEN, *MADE])}
    for name, options in LAYOUTS.items():
        write_checkpoint(paths[name], **options)
    file = paths["A_log as [H]"] / "model.safetensors"
    tensors = {n: t.flatten() if n.endswith("A_log") else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name, rewrite in REWRITTEN.items():
        rewrite(paths["in shards"], paths[name])
    for name, fields in MADE.items():
        make(paths[name], fields)
        for tokenizer in paths["in shards"].glob("tokenizer*"):
            shutil.copy(tokenizer, paths[name])
    return paths


@pytest.fixture(scope="module")
def answers(layouts: dict[str, Path]) -> dict[str, list[int]]:
    models = {name: str(path) for name, path in layouts.items()}
    return in_own_process(answer, models, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.parametrize("layout", [*LAYOUTS, *MADE])
def test_layout_answers_as_the_reference(layouts: dict[str, Path], answers: dict[str, list[int]], layout: str) -> None:
    model = layouts[layout]
    if layout == "A_log as [H]":  # the same values as in the usual shape, the only one the reference reads
        file = model / "model.safetensors"
        tensors = {n: t.view(1, 1, -1, 1) if n.endswith("A_log") else t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert len(answers[layout]) == 24
    score = HfReference(model).score(PROMPT, answers[layout])
    assert score.agrees


@pytest.mark.parametrize("layout", REWRITTEN)
def test_rewritten_answers_as_the_original(answers: dict[str, list[int]], layout: str) -> None:
    assert answers[layout] == answers["in shards"]
