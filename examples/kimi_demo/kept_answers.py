"""The reference's answers to the demo's questions, kept beside the trained checkpoint with its hash.

    python -m kimi_demo.kept_answers

asks transformers and writes them; the demo compares with them, so that it need not ask.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_demo.subject import TRAINED, Subject, trained

if TYPE_CHECKING:
    from kimi_demo.reference import HfReference

NAME = "kept_answers.json"
HASHED = ("config.json", "model.safetensors")
END = "<|im_end|>"


def hashes(model: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint that decides its tokens; none of a file that is not there."""
    files = [model / name for name in HASHED if (model / name).exists()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def name_of(prompt_ids: Sequence[int]) -> str:
    """What a prompt is called in the file: the SHA-256 of its token ids."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()


def read(model: Path) -> dict[str, list[int]]:
    """Tokens of the answer by the name of the prompt; empty where none are kept, or those of another checkpoint."""
    path = model.parent / NAME
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    return {each["prompt"]: each["tokens"] for each in kept["answers"]} if kept["sha256"] == hashes(model) else {}


def answer(reference: "HfReference", subject: Subject, question: str, expected: str) -> tuple[str, list[int]]:
    """The name of a question's prompt, and the reference's greedy tokens, END among them.

    Raises ValueError where the reference answers something else than `expected`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    messages = [{"role": "user", "content": subject.text + question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens = [*tokenizer.encode(expected, add_special_tokens=False), tokenizer.convert_tokens_to_ids(END)]
    if not reference.score(prompt, tokens).agrees:
        raise ValueError(f"to {question!r} the reference does not answer {expected!r}: take other questions")
    return name_of(prompt), tokens


def write(folder: Path) -> None:
    """Ask the reference all questions of `folder`'s model and write the file. Raises ValueError as `answer` does."""
    from kimi_demo.reference import HfReference

    subject = trained(folder)
    if subject is None:
        raise ValueError(f"{folder} has no trained model: run this in the project's tree")
    reference = HfReference(subject.model)
    answers = []
    for question, expected in subject.questions:
        assert expected is not None
        prompt, tokens = answer(reference, subject, question, expected)
        answers.append({"question": question, "prompt": prompt, "tokens": tokens})
    rows = ",\n".join(f"  {json.dumps(each)}" for each in answers)
    text = f'{{\n "sha256": {json.dumps(hashes(subject.model))},\n "answers": [\n{rows}\n ]\n}}\n'
    (folder / NAME).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kimi_demo.kept_answers", description=__doc__.splitlines()[0])
    parser.parse_args()
    try:
        write(TRAINED)
    except ValueError as error:
        parser.error(str(error))
    print(TRAINED / NAME)


if __name__ == "__main__":
    main()
