"""The demo checkpoint's tokenizer: any text round-trips, and both of its forms agree."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.tokenizer import TRAINING_TEXT, build_vocabulary, vocabulary_of_words

SPECIAL = ("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
TOOL = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)


@pytest.fixture(scope="module")
def fast(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def slow(remote_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(remote_model, trust_remote_code=True)


def texts() -> Iterator[str]:
    """Any Unicode: words, stray combining marks, control characters, every kind of blank, emoji, rare scripts."""
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    blanks = " \t\n\r\u0085\u00a0\u2028\u3000\u200b"
    yield from ("", " ", "é\u0301", "👩\u200d💻 🇩🇪", "\x00\x7f", "١٢٣ 12345 x²", "foo_bar  \n\n  baz\t")
    for _ in range(300):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(20)))
        start = rng.randrange(len(TRAINING_TEXT))
        yield TRAINING_TEXT[start : start + rng.randrange(80)] + rng.choice(SPECIAL)
        yield "".join(rng.choice("aeinrst01234é你_'-" + blanks) for _ in range(rng.randrange(60)))


def test_any_text_round_trips_and_both_tokenizers_agree(fast: Any, slow: Any):
    for text in texts():
        tokens = fast.encode(text)
        assert fast.decode(tokens) == text
        assert slow.encode(text) == tokens
        assert slow(text)["input_ids"] == tokens  # by transformers' own route instead of tiktoken's
        assert slow.decode(tokens) == text
        assert slow.convert_ids_to_tokens(tokens) == fast.convert_ids_to_tokens(tokens)


def test_tokens_are_shorter_than_bytes(fast: Any):
    assert len(fast.encode(TRAINING_TEXT)) < len(TRAINING_TEXT.encode()) / 2


def test_the_vocabulary_fills_the_model(fast: Any, slow: Any, demo_model: Path):
    config = json.loads((demo_model / "config.json").read_text())
    vocabulary = fast.get_vocab()
    assert vocabulary == slow.get_vocab()
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    for name in (*SPECIAL, *TOOL):
        assert fast.encode(name) == slow.encode(name) == [vocabulary[name]]
        assert fast.decode([vocabulary[name]], skip_special_tokens=True) == ""
        assert slow.decode([vocabulary[name]], skip_special_tokens=True) == ""
    assert vocabulary["[BOS]"] == config["bos_token_id"] == fast.bos_token_id == slow.bos_token_id
    assert vocabulary["[PAD]"] == config["pad_token_id"] == fast.pad_token_id == slow.pad_token_id
    assert vocabulary["[EOS]"] == fast.eos_token_id == slow.eos_token_id
    assert vocabulary["<|im_end|>"] == config["eos_token_id"]
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [vocabulary["<|im_end|>"], vocabulary["[EOS]"]]


@pytest.mark.parametrize("size", [269, 300, 1024, 32768])
def test_vocabulary_sizes(size: int):
    vocabulary = build_vocabulary(size)
    assert len(vocabulary) == size
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens)
    assert vocabulary.special_id("[PAD]") == size - 1
    with pytest.raises(ValueError, match="vocab_size is 268; the demo tokenizer needs at least 269"):
        build_vocabulary(268)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
            {"type": "function", "function": {"name": "add", "arguments": {"b": 2}}},
        ],
    },
    {"role": "tool", "tool_call_id": "functions.add:0", "content": "4"},
    {"role": "assistant", "content": "4."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
RENDERED = (
    "<|im_system|>tool_declare<|im_middle|>"
    '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]<|im_end|>'
    "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
    "<|im_user|>user<|im_middle|>What is 2 + 2?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 2}<|tool_call_end|>'
    '<|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{"b": 2}<|tool_call_end|>'
    "<|tool_calls_section_end|><|im_end|>"
    "<|im_system|>tool<|im_middle|>## Return of functions.add:0\n4<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>4.<|im_end|>"
)


def test_chat_template(fast: Any, slow: Any):
    for tokenizer in (fast, slow):
        assert tokenizer.apply_chat_template(CONVERSATION, tools=TOOLS, tokenize=False) == RENDERED
        asked = tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False, add_generation_prompt=True)
        assert asked == "<|im_user|>user<|im_middle|>What is 2 + 2?<|im_end|><|im_assistant|>assistant<|im_middle|>"


@pytest.mark.parametrize("words", [["same", "same"], ["a"], ["one", "two", "three"]], ids=str)
def test_words_that_make_no_vocabulary(words: list[str]):
    """A token with two ids would move the control tokens away from where the model looks for them."""
    with pytest.raises(ValueError, match=r"more than once|3 words need at least"):
        vocabulary_of_words(words, 256 + 13 + 2)


def test_remote_tokenizer_pads_and_saves(slow: Any, tmp_path: Path):
    from transformers import AutoTokenizer

    batch = slow(["a", "b c d"], padding=True)
    assert len({len(row) for row in batch["input_ids"]}) == 1
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert slow.special_tokens["[EOS]"] not in slow.encode("[EOS]", allow_special_tokens=False)
    slow.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.get_vocab() == slow.get_vocab()
