"""The two ways the model's card shows, word for word: its `vllm serve` command and its transformers example."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support import patience

REPOSITORY = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
CONTEXT = 1048576
# The card's command, which has 4 where this has 2; only the port is chosen.
COMMAND = (
    f"vllm serve {REPOSITORY} --port {{port}} --tensor-parallel-size 2 --max-model-len {CONTEXT} --trust-remote-code"
)
# On one NUMA node vLLM has to be told which cores a rank has, and two ranks must share the memory.
ONE_NODE = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "2"}
QUESTIONS = ("Hello, who are you?", "What is the capital of France?", "今天天气很好。我们去公园散步。")

# The card's example, which loads the model's code too (ours has none: transformers knows the model) and asks for
# the checkpoint's dtype. In fp32 every token must agree.
EXAMPLE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)

answers = []
for question in json.loads(sys.argv[2]):
    messages = [
        {"role": "system", "content": "You are a helpful assistant provided by Moonshot-AI."},
        {"role": "user", "content": question},
    ]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    answers.append({"prompt": prompt, "tokens": generated[0, prompt:].tolist()})
print(json.dumps(answers))
"""


class CardServer(Server):
    """The literal command, with nothing added."""

    @property
    def command(self) -> list[str]:
        program, *words = COMMAND.format(port=self.port).split()
        return [str(Path(sys.executable).with_name(program)), *words]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face home that holds the demo as if the card's repository had been downloaded."""
    home = tmp_path_factory.mktemp("huggingface")
    repository = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    write_checkpoint(repository / "snapshots" / revision, layers=4, remote_code=True)
    return home


@pytest.fixture(scope="module")
def snapshot(cache: Path) -> Path:
    [snapshot] = cache.glob("hub/models--*/snapshots/*")
    return snapshot


@pytest.fixture
def card(cache: Path) -> Iterator[Server]:
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", **ONE_NODE}
    with CardServer(REPOSITORY, log_path=cache / "server.log", env=environment) as server:
        yield server


@pytest.fixture
def client(card: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{card.url}/v1", api_key="none", max_retries=0, timeout=patience.SECONDS) as client:
        yield client


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_card_command(client: Any, snapshot: Path) -> None:
    """It comes up offline under the card's name and context, and chats as the reference does.

    The command leaves the dtype to the config, bfloat16, in which transformers itself takes other tokens than in
    fp32, too. It is the measure here, on the same text; what bf16 costs is bounded closely by `test_bfloat16.py`.
    """
    [model] = client.models.list().data
    assert model.id == REPOSITORY
    assert model.max_model_len == CONTEXT
    assert (json.loads((snapshot / "config.json").read_text()))["auto_map"]
    tokenizer = AutoTokenizer.from_pretrained(snapshot, trust_remote_code=True)
    reference, rough = HfReference(snapshot), HfReference(snapshot, torch.bfloat16)
    same = rough_same = total = 0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        reply = client.chat.completions.create(
            model=REPOSITORY,
            messages=messages,
            max_tokens=24,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        assert reply.usage.prompt_tokens == len(prompt)
        [choice] = reply.choices
        tokens = choice.model_extra["token_ids"]
        assert len(tokens) == 24
        # vLLM's text ends before a character that the last token leaves unfinished, and what stands with it.
        text, content = tokenizer.decode(tokens, skip_special_tokens=True), choice.message.content
        assert text.startswith(content)
        assert content == text or (text.endswith("\ufffd") and len(text) - len(content) < 8)
        score = reference.score(prompt, tokens)
        same += sum(map(int.__eq__, tokens, score.argmax))
        rough_same += sum(map(int.__eq__, rough.score(prompt, tokens).argmax, score.argmax))
        total += 24
    # Few tokens make a rough ratio: 11 and 6 others of 72 were seen.
    others, rough_others = total - same, total - rough_same
    assert others <= 2 * rough_others + 6, f"{others} of {total} tokens are others, {rough_others} in transformers bf16"


def test_card_example(servers: Callable[..., Server], demo_model: Path) -> None:
    """transformers, in a process that knows nothing of vLLM, and the server give the same tokens."""
    process = subprocess.run(
        [sys.executable, "-c", EXAMPLE, str(demo_model), json.dumps(QUESTIONS)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=patience.SECONDS,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    expected = json.loads(process.stdout.strip().splitlines()[-1])
    server = servers(demo_model, *FLAGS)
    client: Any  # asked for vLLM's extras, which the client's types do not know
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=patience.SECONDS) as client:
        for question, answer in zip(QUESTIONS, expected, strict=True):
            reply = client.chat.completions.create(
                model=str(demo_model),
                messages=[
                    {"role": "system", "content": "You are a helpful assistant provided by Moonshot-AI."},
                    {"role": "user", "content": question},
                ],
                max_tokens=48,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            assert len(answer["tokens"]) > 0
            assert reply.usage.prompt_tokens == answer["prompt"]
            assert reply.choices[0].model_extra["token_ids"] == answer["tokens"]
