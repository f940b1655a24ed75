"""Let patches that cannot see the model tell this model's processes from others'."""

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
    symptom="A patch of code that knows no model, such as a sampler, would apply to all models.",
    cause="vLLM loads plugins in an engine's or a worker's process before it says which model the process is for.",
    upstream="Not reported.",
    remove_when="no patch of scope `process` is left.",
    hooks=(
        # An engine's executor: the engine itself loads the plugins.
        Hook("vllm.v1.executor.abstract:Executor.__init__", "self vllm_config ...", serve_ours_if_so),
        Hook("vllm.v1.worker.worker_base:WorkerBase.__init__", "self vllm_config ...", serve_ours_if_so),
    ),
)
