"""The modules that a LoRA adapter may target, and what each is called here."""

import re
from typing import Any

from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parameters import GATE_UP, GATES_B, KDA_IN_PROJ, MLA_IN_PROJ, parameter_of

TARGETS = tuple(dict.fromkeys((*KDA_IN_PROJ, *GATES_B, *MLA_IN_PROJ, "o_proj", *GATE_UP, "down_proj")))
REMEDY = "merge the adapter into the checkpoint with PEFT's merge_and_unload, or train it without that module"


class AdapterNames:
    """What vLLM takes for a mapper of names: those of an adapter's tensors -> those of this model's modules.

    An adapter has the names of the model that it was trained on: of transformers' own while it runs, which differ from
    its checkpoint's, or of the checkpoint's remote code.
    """

    def __init__(self, model_sizes: ModelSizes) -> None:
        self.modules: dict[str, str] = {}  # the checkpoint's name -> ours
        self.shapes: dict[str, tuple[str, tensors.Shape]] = {}  # ours -> the checkpoint's name, and its weight's shape
        for weight in tensors.weights(model_sizes):
            stem, _, part = (weight.linear_layer or "").rpartition(".")
            if part in TARGETS:
                fused = parameter_of(weight, model_sizes)[0].endswith(".in_proj.weight")
                ours = f"{stem}.in_proj.{part}" if fused else f"{stem}.{part}"
                self.modules[f"{stem}.{part}"] = ours
                self.shapes[ours] = f"{stem}.{part}", weight.shape

    def get_rename_mapper(self) -> "AdapterNames":
        return self

    def _map_name(self, tensor: str) -> str:
        """Raises ConfigError for a tensor of a module that takes no adapter."""
        match = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", tensor)
        name = (match[1] if match else tensor).replace(".forget_gate.", ".")
        moe, dense = (".block_sparse_moe.", ".mlp.")
        for candidate in (name, name.replace(dense, moe), name.replace(moe, dense)):
            if match and candidate in self.modules:
                return f"{self.modules[candidate]}.{match[2]}"
        raise ConfigError(
            f"adapter tensor {tensor} is for a module that takes no adapter ({', '.join(TARGETS)} do); {REMEDY}"
        )

    def check(self, adapter: Any) -> None:
        """Raises ConfigError for a matrix that does not fit its weight, or is missing. `adapter`: vLLM's LoRAModel."""
        if not adapter.loras:
            raise ConfigError("adapter_model has no tensor; save the adapter again")
        for ours, pair in adapter.loras.items():
            name, (rows, columns) = self.shapes[ours]
            pairs = (("A", pair.lora_a, (pair.rank, columns)), ("B", pair.lora_b, (rows, pair.rank)))
            for matrix, found, wanted in pairs:
                tensor = f"adapter tensor {name}.lora_{matrix}.weight"
                if found is None:
                    raise ConfigError(f"{tensor} is missing; save the adapter again")
                if tuple(found.shape) != wanted:
                    raise ConfigError(
                        f"{tensor} has shape {list(found.shape)} where the model and adapter_config.json ask for "
                        f"{list(wanted)}; use an adapter that was trained on this model"
                    )
