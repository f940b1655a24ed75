"""A vLLM that the plugin does not know: this model is refused, or served without prefix caching; others work."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.own_process import in_own_process
from vllm_kimi_linear.supported.versions import UNSUPPORTED

NEWER = "0.99.0"
PROMPT = list(range(2, 62)) * 5


def start(models: list[str]) -> list[list[Any]]:
    """For each model [prefix caching, tokens of an answer], or the [class, message] that ends the start."""
    from vllm import version

    version.__version__ = NEWER
    from vllm import LLM, SamplingParams

    found: list[list[Any]] = []
    for model in models:
        try:
            llm = LLM(
                model,
                distributed_executor_backend="uni",
                dtype="float32",
                max_model_len=512,
                kv_cache_memory_bytes=64 << 20,
                enable_prefix_caching=True,
            )
        except Exception as error:
            found.append([type(error).__name__, str(error)])
            continue
        wanted = SamplingParams(temperature=0, max_tokens=8)
        [answer] = llm.generate({"prompt_token_ids": PROMPT}, wanted, use_tqdm=False)
        caching = llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        found.append([caching, list(answer.outputs[0].token_ids)])
    return found


ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_this_model_is_refused_in_a_sentence(demo_model: Path, llama: Path) -> None:
    (kind, message), (caching, _) = in_own_process(start, [str(demo_model), str(llama)], **ONE_PROCESS)
    assert kind == "ConfigError"
    assert f"vLLM {NEWER}" in message and UNSUPPORTED in message and "\n" not in message
    assert caching is True


def test_unsupported_is_without_prefix_caching(demo_model: Path, answers: list[int]) -> None:
    [(caching, tokens)] = in_own_process(start, [str(demo_model)], **ONE_PROCESS, **{UNSUPPORTED: "1"})
    assert caching is False
    assert tokens == answers


@pytest.fixture(scope="module")
def answers(demo_model: Path) -> list[int]:
    """The reference's."""
    from kimi_demo.reference import HfReference

    return HfReference(demo_model).greedy(PROMPT, 8)
