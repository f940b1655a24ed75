"""Model classes named by the demo checkpoint's auto_map: transformers' own, under the original's names."""

from transformers.models.kimi_linear import modeling_kimi_linear as native

from .configuration_kimi import KimiLinearConfig


class KimiLinearModel(native.KimiLinearModel):
    config_class = KimiLinearConfig


class KimiLinearForCausalLM(native.KimiLinearForCausalLM):
    config_class = KimiLinearConfig
