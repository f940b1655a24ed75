"""A checkpoint whose tokenizer was written for transformers 4, as copies of Kimi Linear's first one are."""

from pathlib import Path

from kimi_demo.checkpoint import write_checkpoint

OLD = "from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode"


def write_old_tokenizer(folder: Path) -> Path:
    """The demo with custom tokenizer code that has its alphabet from where transformers 5 no longer has it."""
    write_checkpoint(folder, layers=4, remote_code=True)
    path = folder / "tokenization_kimi.py"
    lines = path.read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "visible = " in line)
    lines[first : first + 3] = ["        self.byte_encoder = bytes_to_unicode()\n"]
    path.write_text(f"{OLD}\n{''.join(lines)}")
    return folder
