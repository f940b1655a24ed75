# ruff: noqa: RUF001 - letters and signs of many languages are what the training text is for
"""The demo checkpoint's tokenizer: byte-level BPE learned from a page of text, with the K2 special tokens.

Ids are laid out as in the real checkpoint: the 256 bytes, then learned tokens in merge order, then special
tokens from ``[BOS]`` on, ``[PAD]`` last, so that the vocabulary fills the model's exactly. The same ranks are
written either as ``tokenizer.json`` or as ``tiktoken.model`` beside custom tokenizer code.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The real tokenizer's control tokens, in its order. Reserved tokens fill what is left before [PAD].
LEADING_SPECIALS = (
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|im_middle|>",
)
PAD = "[PAD]"

# What may merge: a word with the blank before it, up to three digits, a run of signs, a run of white space.
# Every character belongs to exactly one alternative; no look-around, so that every regex engine agrees.
SPLIT = r"[^\S\r\n]?[\p{L}\p{M}]+|\p{N}{1,3}|[^\S\r\n]?[^\s\p{L}\p{M}\p{N}]+|\s+"
# The same cut for Python's re: letters and marks are the word characters without digits and underscore, which
# differs from SPLIT only outside TRAINING_TEXT.
_TRAINING_SPLIT = re.compile(r"[^\S\r\n]?[^\W\d_]+|\d{1,3}|[^\S\r\n]?(?:[^\s\w]|_)+|\s+")

CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- elif message.content -%}
    {%- for part in message.content -%}
      {{- part.text if part is mapping else part -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  {{- '<|im_system|>tool_declare<|im_middle|>' ~ (tools | tojson) ~ '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<|im_user|>' ~ (message.name or 'user') ~ '<|im_middle|>' ~ content_of(message) -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_assistant|>' ~ (message.name or 'assistant') ~ '<|im_middle|>' ~ content_of(message) -}}
    {%- if message.tool_calls -%}
      {{- '<|tool_calls_section_begin|>' -}}
      {%- for call in message.tool_calls -%}
        {%- set arguments = call.function.arguments -%}
        {{- '<|tool_call_begin|>' ~ (call.id or 'functions.' ~ call.function.name ~ ':' ~ loop.index0) -}}
        {{- '<|tool_call_argument_begin|>' -}}
        {{- arguments if arguments is string else arguments | tojson -}}
        {{- '<|tool_call_end|>' -}}
      {%- endfor -%}
      {{- '<|tool_calls_section_end|>' -}}
    {%- endif -%}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_system|>' ~ (message.name or 'tool') ~ '<|im_middle|>' -}}
    {{- '## Return of ' ~ message.tool_call_id ~ '\\n' ~ content_of(message) -}}
  {%- else -%}
    {{- '<|im_system|>' ~ (message.name or message.role) ~ '<|im_middle|>' ~ content_of(message) -}}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""

TRAINING_TEXT = """\
The river keeps no record of the rain, and yet its bed has the shape of every flood. A short memory is not a
poor one: what must be kept is kept, what can be forgotten makes room. The state is a small matrix, and each new
token writes one row of it, erases a little, and reads the answer back.
Question: what is the capital of France? Answer: Paris is the capital of France. Question: how many days are
there in a week? Answer: there are seven days in a week. Please write a short story about a lighthouse keeper
who counts the ships that pass in the night. Once upon a time there was a lighthouse on a rock, and in it lived
an old woman with a cat. Every evening she lit the lamp; every morning she wrote down how many ships had passed.
Tell me about the weather. Today it is sunny, tomorrow it will be cloudy with some rain in the afternoon, and the
wind comes from the north. Could you explain how a linear attention layer works? It works with a decay for every
channel, a key, a value and a query. Thank you very much! You are welcome. Where does the train to Berlin leave?
It leaves from platform 12 at 10:45, and the ticket is 29.90 euros. Hello, world! My name is Kim. Who are you?
I am a very small model with random weights, so nothing that I say should be believed by anybody.
def fibonacci(n):
    first, second = 0, 1
    for _ in range(n):
        first, second = second, first + second
    return first

import json, os, sys
class Shape:
    def __init__(self, width, height):
        self.width = width
        self.height = height
    def area(self) -> int:
        return self.width * self.height

{"name": "get_weather", "arguments": {"city": "Hamburg", "unit": "celsius"}, "type": "function", "strict": true}
{"type": "object", "properties": {"count": {"type": "integer"}, "tags": {"type": "array"}}, "required": ["count"]}
| month | sales | share |
| --- | --- | --- |
| January | 1,024 | 31% |
| February | 2,048 | 62% |
# A heading
1. Take two eggs, 250 g of flour and half a litre of milk. 2. Stir until smooth. 3. Bake in butter for 3 minutes.
- The cat sits under the table, the dog sleeps beside the stove, and the bird sings outside the window.
In the year 1969 people first walked on the moon; about 3.8 billion years earlier it had been a sea of lava.
Le chat dort près de la fenêtre et rêve d'un été sans fin. Où est la bibliothèque? Elle est derrière l'église.
Der Zug fährt über die Brücke, während draußen der Schnee fällt; schöne Grüße aus München. Wie spät ist es?
El niño come una manzana por la mañana. ¿Dónde está el corazón de la ciudad? Mañana será otro día.
Поезд уходит утром, и снег тихо падает на город. Привет, как дела? Спасибо, хорошо.
今天天气很好，我们去公园散步。你好，世界！请问图书馆在哪里？谢谢你的帮助。
今日はいい天気ですね。ありがとうございます。電車は何時に出ますか。
안녕하세요, 오늘은 날씨가 좋습니다. 감사합니다.
مرحبا بالعالم، كيف حالك اليوم؟ नमस्ते दुनिया, आप कैसे हैं?
α + β = γ, x² + y² = r², ∑ ≤ ∞, 20 °C → 68 °F, 5 € ≈ 6 $ … “quoted” – ‘single’ ☺ 😀 👍 🚀
"""


@dataclass(frozen=True)
class Vocabulary:
    """Token bytes by id for the ordinary tokens, and the special tokens that take the ids after them."""

    tokens: tuple[bytes, ...]
    specials: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens) + len(self.specials)

    def special_id(self, name: str) -> int:
        return len(self.tokens) + self.specials.index(name)


@cache  # learning takes a second, and every config of the demo asks for it
def build_vocabulary(size: int) -> Vocabulary:
    """A vocabulary of exactly `size` ids; small ones learn fewer merges, large ones get reserved tokens.

    Raises ValueError if `size` cannot hold the 256 bytes and the control tokens.
    """
    least = 256 + len(LEADING_SPECIALS) + 1
    if size < least:
        raise ValueError(f"vocab_size is {size}; the demo tokenizer needs at least {least}")
    return _with_specials(_learn_merges(size - least), size)


def vocabulary_of_words(words: Sequence[str], size: int) -> Vocabulary:
    """The same, of given words in place of learned merges: each is one token, other text is bytes.

    Raises ValueError if `size` cannot hold the bytes, the words and the control tokens, or a word comes twice.
    """
    twice = [word for word, count in Counter(words).items() if count > 1 or len(word.encode()) < 2]
    if twice:
        raise ValueError(f"words has {twice} more than once, or as single bytes, which are tokens anyway; drop them")
    least = 256 + len(words) + len(LEADING_SPECIALS) + 1
    if size < least:
        raise ValueError(f"vocab_size is {size}; {len(words)} words need at least {least}")
    return _with_specials([word.encode() for word in words], size)


def _with_specials(words: list[bytes], size: int) -> Vocabulary:
    tokens = [bytes([b]) for b in range(256)] + words
    reserved = size - len(tokens) - len(LEADING_SPECIALS) - 1
    names = [*LEADING_SPECIALS, *(f"<|reserved_token_{i}|>" for i in range(reserved)), PAD]
    return Vocabulary(tuple(tokens), tuple(names))


def _learn_merges(limit: int) -> list[bytes]:
    """The first `limit` tokens that byte-pair encoding learns; ties go to the smaller pair of bytes."""
    words = Counter(_TRAINING_SPLIT.findall(TRAINING_TEXT))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    learned: dict[bytes, None] = {}
    while len(learned) < limit:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned[left + right] = None
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return list(learned)


def write_fast_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for AutoTokenizer without remote code."""
    fast_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _write_tokenizer_config(vocabulary, folder, {"tokenizer_class": "PreTrainedTokenizerFast"})


def fast_tokenizer(vocabulary: Vocabulary) -> "Tokenizer":
    """The vocabulary as a tokenizer of the library `tokenizers`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    spelled = ["".join(letters[b] for b in token) for token in vocabulary.tokens]
    known = set(spelled)
    # Every way to split a token into two tokens, in the order of the token: merging then picks the pair whose
    # result has the lowest rank, which is tiktoken's rule.
    merges = [
        (token[:cut], token[cut:])
        for token in spelled
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    # A word that is a token is that token, merges or not: tiktoken's rule again.
    model = models.BPE(vocab={t: i for i, t in enumerate(spelled)}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in vocabulary.specials])
    return tokenizer


def write_remote_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Writes tiktoken.model, the tokenizer's code and tokenizer_config.json, for --trust-remote-code."""
    ranks = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(vocabulary.tokens))
    (folder / "tiktoken.model").write_text("".join(ranks))
    code = resources.files("kimi_demo.remote_code") / "tokenization_kimi.py"
    (folder / "tokenization_kimi.py").write_text(code.read_text())
    _write_tokenizer_config(
        vocabulary,
        folder,
        {
            "tokenizer_class": "TikTokenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
            "added_tokens_decoder": {
                str(vocabulary.special_id(name)): {"content": name, "special": True, "normalized": False}
                for name in vocabulary.specials
            },
        },
    )


def _write_tokenizer_config(vocabulary: Vocabulary, folder: Path, fields: dict) -> None:
    controls = [name for name in vocabulary.specials if not name.startswith(("[", "<|reserved"))]
    config = {
        **fields,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": PAD,
        "additional_special_tokens": controls,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")


def _byte_letters() -> list[str]:
    """A printable character for each byte, in the byte-level alphabet that tokenizer.json uses.

    Visible Latin-1 characters stand for themselves; the others, in order, for U+0100 and up.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(256)]
