"""A checkpoint that several files of this folder use: another architecture."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers with random weights, and a tokenizer of 64 words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
