"""Refuse an adapter whose matrices do not fit the model."""

from typing import Any

from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def check_shapes(original: Function) -> Function:
    def from_lora_tensors(cls: Any, *args: Any, weights_mapper: Any = None, **kwargs: Any) -> Any:
        from vllm_kimi_linear.adapters.names import AdapterNames

        adapter = original(cls, *args, weights_mapper=weights_mapper, **kwargs)
        if isinstance(weights_mapper, AdapterNames):
            weights_mapper.check(adapter)
        return adapter

    return from_lora_tensors


PATCH = Patch(
    symptom="An adapter trained on a smaller model is accepted, and the answers are wrong.",
    cause="vLLM copies an adapter's matrices into a corner of the model's, whatever their sizes.",
    remove_when="vLLM compares their shapes.",
    hooks=(Hook("vllm.lora.lora_model:LoRAModel.from_lora_tensors", "cls ... weights_mapper ...", check_shapes),),
)
