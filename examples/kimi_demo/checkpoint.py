"""Writes a small Kimi Linear checkpoint with random weights, in the original layout and config keys.

    python -m kimi_demo.checkpoint --out DIR

It is for tests and trials: every part of the model contributes to the logits, the gates cover their whole range
(docs/kda.md section 3), and the same seed gives the same bytes.
"""

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

from kimi_demo.presets import PRESETS, demo_config
from kimi_demo.random_weights import RandomWeights
from kimi_demo.tokenizer import build_vocabulary, write_fast_tokenizer, write_remote_tokenizer
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.tensors import weights as tensors_of

# What a run may leave in its folder, so that the next run there can replace it.
WRITTEN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "tokenization_kimi.py",
    "configuration_kimi.py",
    "modeling_kimi.py",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def write_checkpoint(
    folder: Path,
    preset: str = "demo",
    *,
    seed: int = 0,
    layers: int | None = None,
    dtype: str = "bfloat16",
    shards: int = 1,
    remote_code: bool = False,
) -> int:
    """Writes config, tokenizer and weights into `folder` and returns the number of parameters.

    Files that another run left there are replaced, not kept. Raises ValueError for options that do not fit.
    """
    config = demo_config(preset, layers, dtype)
    tensors = sum(1 for _ in tensors_of(ModelSizes.from_config(config)))
    if not 1 <= shards <= tensors:
        raise ValueError(f"--shards is {shards}; this checkpoint has {tensors} tensors, give 1 to that many")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; give a number from 0")
    vocabulary = build_vocabulary(config["vocab_size"])
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN:
        for old in folder.glob(pattern):
            old.unlink()
    if remote_code:
        write_remote_tokenizer(vocabulary, folder)
        config["auto_map"] = {
            "AutoConfig": "configuration_kimi.KimiLinearConfig",
            "AutoModel": "modeling_kimi.KimiLinearModel",
            "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
        }
        for name in ("configuration_kimi.py", "modeling_kimi.py"):
            code = resources.files("kimi_demo.remote_code") / name
            (folder / name).write_text(code.read_text())
    else:
        write_fast_tokenizer(vocabulary, folder)
    ends = [vocabulary.special_id("<|im_end|>"), vocabulary.special_id("[EOS]")]
    special = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special | {"eos_token_id": ends})
    count = _write_weights(folder, RandomWeights(config, vocabulary, seed, dtype), shards)
    _write_json(folder / "config.json", config)  # last: a folder with a config is complete
    return count


def _write_weights(folder: Path, weights: RandomWeights, shards: int) -> int:
    from safetensors.torch import save_file

    tensors = dict(weights)
    names = list(tensors)
    where: dict[str, str] = {}
    for index in range(shards):
        part = names[len(names) * index // shards : len(names) * (index + 1) // shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file's own mode keeps other users, such as a container's, out
        where |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return sum(t.numel() for t in tensors.values())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kimi_demo.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="sizes and layout (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers (default: the preset's)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="weight files to split into (default: 1)")
    parser.add_argument(
        "--remote-code", action="store_true", help="tiktoken files and custom code, for --trust-remote-code"
    )
    args = parser.parse_args(argv)
    try:
        count = write_checkpoint(
            args.out,
            args.preset,
            seed=args.seed,
            layers=args.layers,
            dtype=args.dtype,
            shards=args.shards,
            remote_code=args.remote_code,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {count / 1e6:.1f} M parameters, preset {args.preset}, seed {args.seed}")


if __name__ == "__main__":
    main()
