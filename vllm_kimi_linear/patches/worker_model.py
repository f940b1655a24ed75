"""Tell the workers of this model from those of others, for patches that cannot."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch, serve_ours


def patch_workers_of_ours(original: Function) -> Function:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.model_config is not None and vllm_config.model_config.architecture == ARCHITECTURE:
            serve_ours()
        original(self, vllm_config, *args, **kwargs)

    return __init__


PATCH = Patch(
    symptom="A plugin that mends what knows no model, such as a sampler, mends it for all models.",
    cause="vLLM loads plugins in a worker before it says which model the worker is for.",
    upstream="Not reported.",
    remove_when="no patch of scope `process` is left.",
    hooks=(
        Hook(
            "vllm.v1.worker.worker_base:WorkerBase.__init__",
            "self vllm_config ...",
            patch_workers_of_ours,
        ),
    ),
)
