"""Keep serving after an adapter that could not be loaded, with several ranks."""

from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def load_or_say_why(worker: Any, lora_request: Any) -> bool | str:
    """In a worker: whether the adapter is loaded, or what kept it from that."""
    try:
        return bool(worker.add_lora(lora_request))
    except ConfigError as error:
        return str(error)
    except Exception as error:  # of vLLM's, or of the files: it says no more than a trace does
        logger.exception("Kimi Linear: adapter %s could not be loaded", lora_request.lora_name)
        return str(error) or type(error).__name__


def raise_after_all_answered(original: Function) -> Function:
    def add_lora(self: Any, lora_request: Any) -> bool:
        if self.vllm_config.model_config.architecture != ARCHITECTURE:
            return bool(original(self, lora_request))
        answers = self.collective_rpc(load_or_say_why, args=(lora_request,))
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        return all(answers)

    return add_lora


PATCH = Patch(
    symptom="With several ranks, once an adapter could not be loaded, every other adapter is refused with the same "
    "error until the server restarts.",
    cause="`collective_rpc` stops at the first rank's error and leaves the other ranks' replies in their queues, "
    "where the next call takes them for its own.",
    upstream="vllm-project/vllm#57846.",
    remove_when="a failed call reads every reply.",
    hooks=(Hook("vllm.v1.executor.abstract:Executor.add_lora", "self lora_request", raise_after_all_answered),),
)
