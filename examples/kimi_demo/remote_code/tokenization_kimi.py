"""Tokenizer over tiktoken ranks, loaded with --trust-remote-code. The interface is that of Kimi's own."""

import base64
import shutil
from pathlib import Path

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

# What may merge; every character belongs to exactly one alternative.
SPLIT = r"[^\S\r\n]?[\p{L}\p{M}]+|\p{N}{1,3}|[^\S\r\n]?[^\s\p{L}\p{M}\p{N}]+|\s+"


class TikTokenTokenizer(PreTrainedTokenizer):
    """Tokens are spelled in the byte-level alphabet, so that every byte sequence has a printable name."""

    vocab_files_names = {"vocab_file": "tiktoken.model"}  # noqa: RUF012 - transformers' own form
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        vocab_file,
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token=None,
        pad_token="[PAD]",
        additional_special_tokens=None,
        added_tokens_decoder=None,
        **kwargs,
    ):
        self.vocab_file = vocab_file
        lines = (line.split() for line in Path(vocab_file).read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        added = {int(i): _added(token) for i, token in (added_tokens_decoder or {}).items()}
        self.special_tokens = {str(token): i for i, token in added.items()}
        self.model = tiktoken.Encoding(
            "kimi_demo", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.n_words = self.model.n_vocab

        visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(0x100, 0x200))
        self.byte_encoder = {b: chr(b if b in visible else next(others)) for b in range(256)}
        self.byte_decoder = {letter: b for b, letter in self.byte_encoder.items()}
        self.encoder = {self._spell(token): rank for token, rank in ranks.items()} | self.special_tokens
        self.decoder = {i: token for token, i in self.encoder.items()}
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            additional_special_tokens=additional_special_tokens,
            added_tokens_decoder=added,
            special_tokens_pattern="none",
            **kwargs,
        )

    def _spell(self, token: bytes) -> str:
        return "".join(self.byte_encoder[b] for b in token)

    @property
    def vocab_size(self):
        return self.n_words

    def get_vocab(self):
        return dict(self.encoder)

    def encode(self, text, allow_special_tokens=True, **kwargs):
        """Ids of `text`; names of special tokens in it become those tokens, or plain text if not allowed."""
        if kwargs.keys() - {"add_special_tokens"} or not isinstance(text, str):
            return super().encode(text, **kwargs)
        if allow_special_tokens:
            return self.model.encode(text, allowed_special="all")
        return self.model.encode_ordinary(text)

    def _tokenize(self, text, **kwargs):
        return [self.decoder[i] for i in self.model.encode_ordinary(text)]

    def _convert_token_to_id(self, token):
        return self.encoder.get(token)

    def _convert_id_to_token(self, index):
        return self.decoder.get(index)

    def convert_tokens_to_string(self, tokens):
        data = bytes(self.byte_decoder[letter] for token in tokens for letter in token or "")
        return data.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory, prefix + self.vocab_files_names["vocab_file"])
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def _added(token):
    return AddedToken(**token) if isinstance(token, dict) else token
