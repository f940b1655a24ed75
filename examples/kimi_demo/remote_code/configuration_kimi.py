"""Configuration named by the demo checkpoint's auto_map; vLLM brings its own and does not need it."""

from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig as NativeConfig


class KimiLinearConfig(NativeConfig):
    """Transformers' own, with the method that the original's has."""

    def is_kda_layer(self, layer_idx: int) -> bool:
        """Whether 0-based layer `layer_idx` is KDA; the lists of config.json count from 1."""
        return layer_idx + 1 in self.linear_attn_config["kda_layers"]
