"""Kimi Linear for vLLM: the plugin's front door.

vLLM calls `register()` in every process it starts, some of them more than once, so it only hands over
names: neither torch nor vLLM is imported before vLLM asks for them.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

ARCHITECTURE = "KimiLinearForCausalLM"


def register() -> None:
    """Tell vLLM where our model, its KDA metadata backend and its configuration checks live.

    Entry point `kimi_linear` of the group `vllm.general_plugins`. Idempotent.
    """
    # Tiles for the experts on GPUs for which vLLM has none, by benchmarks/expert_tiles.py.
    os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(Path(__file__).with_name("tiles")))

    from vllm.model_executor.models import ModelRegistry

    from vllm_kimi_linear import compat, start_checks

    start_checks.report_install()
    start_checks.register()
    compat.apply()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
