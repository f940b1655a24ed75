"""Tell the engines and workers of this model from those of others, for patches that cannot."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch, serve_ours


def serve_ours_if_so(original: Function) -> Function:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.model_config is not None and vllm_config.model_config.architecture == ARCHITECTURE:
            serve_ours()
        original(self, vllm_config, *args, **kwargs)

    return __init__


PATCH = Patch(
    symptom="A plugin that mends what knows no model, such as a sampler, mends it for all models.",
    cause="vLLM loads plugins in an engine's or a worker's process before it says which model the process is for.",
    upstream="Not reported.",
    remove_when="no patch of scope `process` is left.",
    hooks=(
        # An engine's executor: the engine itself loads the plugins.
        Hook("vllm.v1.executor.abstract:Executor.__init__", "self vllm_config ...", serve_ours_if_so),
        Hook("vllm.v1.worker.worker_base:WorkerBase.__init__", "self vllm_config ...", serve_ours_if_so),
    ),
)
