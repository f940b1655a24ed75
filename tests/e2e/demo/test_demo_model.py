"""The small model's data, network and trainer: what it is asked is true, and what it learns is Kimi Linear."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.demo_model import batches, figure4, train, words
from examples.demo_model.config import config
from examples.demo_model.conversations import KINDS, MOST_RECORDS, Asker, make_log
from examples.demo_model.network import KimiLinear
from kimi_demo.reference import HfReference
from vllm_kimi_linear.config.model import ModelSizes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small for more, and other tests' servers use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [60, 500, 60_000])
def test_answers_are_in_the_log(tokens: int):
    rng = random.Random(tokens)
    log = make_log(rng, tokens)
    codes = {}
    for line in log.lines:
        if line.startswith("The code of "):
            name, code = line.removeprefix("The code of ").removesuffix(".").split(" is ")
            codes[name] = code
    assert len(log.records) <= MOST_RECORDS and {name: log.latest(name)[1] for name in codes} == codes
    asker = Asker(log, rng)
    for kind in KINDS:
        for _ in range(20):
            asked = asker.ask(kind)
            if kind == "repeat":
                assert asked.text == f"Repeat this line: {asked.answer}"
                continue
            said = [answer.removeprefix("The code of ").strip(".").split(" is ") for answer in asked.answer.split(". ")]
            assert len(said) == (asked.text.count(",") + 2 if kind == "several" else 1)
            for name, code in said:
                assert name in asked.text and code == codes.get(name, "unknown")
            assert (kind == "absent") <= (said[0][1] == "unknown")


def test_every_word_is_a_token():
    vocabulary = words.vocabulary()
    assert len(vocabulary) == words.VOCABULARY_SIZE
    assert batches.encode("[PAD]") == [words.VOCABULARY_SIZE - 1]
    rng = random.Random(0)
    text = make_log(rng, 3000).text
    ids = batches.encode(text)
    single = {bytes([byte]) for byte in b" .\n0123456789"}
    assert all(len(token) > 1 or token in single for token in (vocabulary.tokens[i] for i in ids))
    assert b"".join(vocabulary.tokens[i] for i in ids).decode() == text


def test_a_batch_marks_the_answers():
    batch = batches.make_batch(512, 3, seed=1)
    again = batches.make_batch(512, 3, seed=1)
    assert (batch.ids == again.ids).all() and batch.ids.shape == (3, 512)
    end, vocabulary = words.vocabulary().special_id("<|im_end|>"), words.vocabulary()
    said = batch.ids.flatten()[batch.predicted_at + 1].tolist()
    groups = [[s for s, q in zip(said, batch.question, strict=True) if q == n] for n in range(len(batch.kinds))]
    assert all(group[-1] == end and group.count(end) == 1 for group in groups)
    texts = {b"".join(vocabulary.tokens[i] for i in group[:-1]).decode() for group in groups}
    assert all(text.startswith("The ") and text.endswith(".") for text in texts)


def test_the_template_is_the_checkpoints(tmp_path: Path):
    from transformers import AutoTokenizer

    words.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "What is the code of Anna Weber?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == batches.encode(batches.USER + messages[0]["content"] + batches.ASSISTANT)


def test_the_network_is_transformers(tmp_path: Path):
    torch.manual_seed(0)
    model = KimiLinear(ModelSizes.from_config(config()))
    for router in model.routers():
        router.e_score_correction_bias.normal_(std=0.1)
    save_file(model.checkpoint(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config()))
    model.load_state_dict(
        {
            name: value if name.endswith(("A_log", "dt_bias", "correction_bias")) else value.bfloat16().float()
            for name, value in model.state_dict().items()
        }
    )
    ids = torch.randint(0, words.VOCABULARY_SIZE, (2, 150))
    with torch.no_grad():
        logits = model.lm_head(model(ids))
    reference = HfReference(tmp_path)
    for row, ours in zip(ids, logits, strict=True):
        assert (ours - reference.logits(row.tolist())).abs().max() < 1e-4


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    arguments = ["train", "--out", str(tmp_path), "--tokens=192", "--workers=1", "--every=2"]
    for steps in (2, 4):
        monkeypatch.setattr("sys.argv", [*arguments, f"--steps={steps}"])
        train.main()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert HfReference(tmp_path / "checkpoint").logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("task", figure4.TASKS)
def test_synthetic_tasks_have_one_answer(task: str):
    torch.manual_seed(0)
    ids, counts = figure4.TASKS[task](3, "cpu")
    assert ids.shape == counts.shape and figure4.LENGTH - 1 <= ids.shape[1] <= figure4.LENGTH
    for row, where in zip(ids.tolist(), counts.tolist(), strict=True):
        asked = [n for n, counted in enumerate(where) if counted]
        if task == "palindrome":
            assert [row[n + 1] for n in asked] == row[: asked[0]][::-1]
        elif task == "recall":
            pairs = dict(zip(*[iter(row[: asked[0]])] * 2, strict=True))
            assert all(pairs[row[n]] == row[n + 1] for n in asked)
        else:
            held: dict[int, list[int]] = {}
            for push, which, what in zip(*[iter(row)] * 3, strict=True):
                if push:
                    held.setdefault(which, []).append(what)
                else:
                    assert held[which].pop() == what
