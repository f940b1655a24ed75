"""Tokenizer code written for transformers 4 loads for this model, and reads as its mended form does."""

import json
import logging
from pathlib import Path

import pytest
from transformers.models.gpt2 import tokenization_gpt2
from vllm.tokenizers import get_tokenizer

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.tokenizer import TRAINING_TEXT
from tests.support.old_tokenizer import write_old_tokenizer
from vllm_kimi_linear.patches import all as patches
from vllm_kimi_linear.patches.old_tokenizer import NAME

TEXTS = [TRAINING_TEXT, "<|im_user|>user<|im_middle|>Hello<|im_end|>", "\x00\x7f\xad\u200b 😀\t\r\n", ""]


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    patches.apply()


def test_old_code_reads_as_its_mended_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "new", layers=4, remote_code=True)
    new = get_tokenizer(str(tmp_path / "new"), trust_remote_code=True)
    with caplog.at_level(logging.INFO, "vllm.kimi_linear"):
        old = get_tokenizer(str(write_old_tokenizer(tmp_path / "old")), trust_remote_code=True)
    assert old.get_vocab() == new.get_vocab()
    for text in TEXTS:
        tokens = old.encode(text)
        assert tokens == new.encode(text)
        assert old.decode(tokens) == new.decode(tokens) == text
        names = old.convert_ids_to_tokens(tokens)
        assert old.convert_tokens_to_string(names) == new.convert_tokens_to_string(names) == text
    assert not hasattr(tokenization_gpt2, NAME)  # supplied while the code loaded, and to it alone


def test_another_model_s_old_code_fails_as_before(tmp_path: Path) -> None:
    folder = write_old_tokenizer(tmp_path / "llama")  # transformers keeps code by the name of its folder
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match=NAME):
        get_tokenizer(str(folder), trust_remote_code=True)


def test_what_else_is_missing_is_said_as_python_says_it(tmp_path: Path) -> None:
    folder = write_old_tokenizer(tmp_path / "more")
    code = folder / "tokenization_kimi.py"
    code.write_text(code.read_text().replace(f"import {NAME}", f"import {NAME}, bytes_to_words"))
    with pytest.raises(ImportError, match="cannot import name 'bytes_to_words'"):
        get_tokenizer(str(folder), trust_remote_code=True)
