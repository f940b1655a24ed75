"""Serve checkpoints whose tokenizer code was written for transformers 4."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.log import logger
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

NAME = "bytes_to_unicode"


@contextlib.contextmanager
def name_supplied() -> Iterator[None]:
    """The function is where transformers 4 had it, too. Found when it is asked for: most checkpoints never do."""
    from transformers.models.gpt2 import tokenization_gpt2 as module

    if hasattr(module, NAME):
        yield
        return

    def __getattr__(name: str) -> Any:
        if name != NAME:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        logger.info_once("The tokenizer's code is for transformers 4: adding %s.%s for it", module.__name__, NAME)
        return bytes_to_unicode

    vars(module)["__getattr__"] = __getattr__
    try:
        yield
    finally:
        del vars(module)["__getattr__"]


def load_old_code(original: Function) -> Function:
    def from_pretrained(cls: Any, path_or_repo_id: Any, *args: Any, **kwargs: Any) -> Any:
        architectures = getattr(kwargs.get("config"), "architectures", None) or ()
        with name_supplied() if ARCHITECTURE in architectures else contextlib.nullcontext():
            return original(cls, path_or_repo_id, *args, **kwargs)

    return from_pretrained


PATCH = Patch(
    symptom="A server with a pruned, quantised or fine-tuned checkpoint does not start: cannot import name "
    "'bytes_to_unicode' from 'transformers.models.gpt2.tokenization_gpt2'.",
    cause="The checkpoint carries the first version of Kimi Linear's tokenizer code. transformers 5 moved the "
    "function; the original repository has been corrected since, copies of it have not.",
    upstream="transformers#43726.",
    remove_when="such checkpoints are gone, or transformers has the name there again.",
    hooks=(Hook("vllm.tokenizers.hf:CachedHfTokenizer.from_pretrained", "cls path_or_repo_id ...", load_old_code),),
)
