"""Tool calls and JSON-schema output. The demo model's words mean nothing, so only form is checked: the grammar
that vLLM puts on the model, and the parser that reads its calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from kimi_demo.presets import DEMO
from kimi_demo.tokenizer import build_vocabulary

row = pytest.mark.conformance

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}

# The grammar lets the model spell a call's control tokens letter by letter as well, which the parser of a stream
# does not read as control tokens; a trained model takes the tokens, the random one is told to.
VOCABULARY = build_vocabulary(DEMO["vocab_size"])
CONTROLS = {str(VOCABULARY.special_id(s)): 100 for s in VOCABULARY.specials if s.startswith("<|tool_call")}
# Nor should it dwell on the white space that JSON allows between any two signs.
TERSE = {str(i): -100 for i, token in enumerate(VOCABULARY.tokens) if token.isspace()}


@pytest.fixture
def chat(client: openai.OpenAI, model: str) -> Callable:
    return lambda **asked: client.chat.completions.create(
        **{
            "model": model,
            "messages": [{"role": "user", "content": "What is the weather?"}],
            "temperature": 0,
            "max_tokens": 2000,
            "logit_bias": TERSE,
            **asked,
        }
    )


def check_call(name: str, arguments: str) -> None:
    values = json.loads(arguments)
    if name == "get_weather":
        assert values.keys() == {"city", "days"}
        assert values["city"] in ("Paris", "Rome")
        assert values["days"] in range(1, 6)
    else:
        assert name == "get_time"
        assert values.keys() == {"zone"}
        assert values["zone"] in ("UTC", "CET")


def streamed_calls(chunks) -> list[tuple[str, str]]:
    """(name, arguments) of each call in a stream; names and ids come once, arguments in pieces."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for piece in choice.delta.tool_calls or []:
                if piece.function.name:
                    assert piece.index not in calls, "a call was named twice"
                    assert piece.id
                    calls[piece.index] = [piece.function.name, ""]
                calls[piece.index][1] += piece.function.arguments or ""
    return [(name, arguments) for name, arguments in calls.values()]


@row("tool calls", '`tool_choice="required"`, two tools: at least one call, arguments valid for its schema')
def test_required(chat: Callable) -> None:
    choice = chat(tools=[WEATHER, CLOCK], tool_choice="required", logit_bias=CONTROLS | TERSE).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        check_call(call.function.name, call.function.arguments)
    assert "<|tool" not in (choice.message.content or "")


@row("tool calls", "`tool_choice` naming a function: one call of it, valid arguments; the same in a stream")
def test_named(chat: Callable) -> None:
    asked = {
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "get_time"}},
        "logit_bias": CONTROLS | TERSE,
    }
    [call] = chat(**asked).choices[0].message.tool_calls
    assert call.function.name == "get_time"
    check_call(call.function.name, call.function.arguments)
    assert call.id
    assert streamed_calls(chat(**asked, stream=True)) == [(call.function.name, call.function.arguments)]


@row("tool calls", '`tool_choice="none"`: text only, no call')
def test_none(chat: Callable) -> None:
    message = chat(tools=[WEATHER], tool_choice="none", max_tokens=20).choices[0].message
    assert not message.tool_calls
    assert message.content


@row("tool calls", "a conversation that holds a call and its result goes on")
def test_result(chat: Callable) -> None:
    call = {
        "id": "functions.get_time:0",
        "type": "function",
        "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'},
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "12:00"},
    ]
    noon = chat(messages=messages, max_tokens=20)
    assert noon.choices[0].message.content
    messages[-1] = {**messages[-1], "content": "18:30"}
    assert chat(messages=messages, max_tokens=20).choices[0].message.content != noon.choices[0].message.content


@row("JSON schema", "`response_format` with bounded strings, arrays and integers: the answer validates")
def test_json_schema(chat: Callable) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    choice = chat(response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert value.keys() == {"name", "tags", "age"}
    assert 1 <= len(value["name"]) <= 8
    assert 1 <= len(value["tags"]) <= 3
    assert all(isinstance(tag, str) and len(tag) <= 4 for tag in value["tags"])
    assert value["age"] in range(151)
    pieces = [c.choices[0].delta.content or "" for c in chat(response_format=form, stream=True)]
    assert "".join(pieces) == choice.message.content


CALLS = [
    ("get_weather", '{"city": "Zürich \U0001f600", "note": "a <b> \\"c\\" {d}", "days": [1, 2]}'),
    ("get_time", '{"zone": "UTC"}'),
]
ANSWER = (
    "Let me look: naïve \U0001f680."
    "<|tool_calls_section_begin|>"
    + "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(CALLS)
    )
    + "<|tool_calls_section_end|>"
)


Reading = tuple[str, list[tuple[str, str]]]  # content, and (name, arguments) of each call


@pytest.fixture(scope="module")
def replay(demo_model: Path) -> tuple[Callable[[list[int]], Reading], int]:
    """vLLM's kimi_k2 parser on ANSWER, fed in pieces that end at the given tokens; and the number of tokens."""
    pytest.importorskip("vllm")
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer.encode(ANSWER, add_special_tokens=False)
    free = json.loads(json.dumps([WEATHER, CLOCK]).replace('"strict": true, ', ""))
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "?"}], tools=free, tool_choice="auto", stream=True
    )
    make = ParserManager.get_parser(
        tool_parser_name="kimi_k2", reasoning_parser_name="", enable_auto_tools=True, tokenizer=tokenizer
    )

    def replay(ends: list[int]) -> Reading:
        parser = make(tokenizer, request.tools)
        content, calls, start, shown = "", {}, 0, ""
        for end in ends:
            # As a server detokenizes: what ends in half a character waits for the other half.
            text = tokenizer.decode(ids[:end]).rstrip("\ufffd")
            delta = parser.parse_delta(
                text[len(shown) :], ids[start:end], request, prompt_token_ids=[], finished=end == len(ids)
            )
            start, shown = end, text
            if delta is None:
                continue
            content += delta.content or ""
            for piece in delta.tool_calls or []:
                if piece.function.name:
                    assert piece.index not in calls, "a call was named twice"
                    calls[piece.index] = [piece.function.name, ""]
                calls[piece.index][1] += piece.function.arguments or ""
        return content, [(name, arguments) for name, arguments in calls.values()]

    return replay, len(ids)


@row("tool calls", '`tool_choice="auto"`: a fixed answer with two calls, replayed token by token')
def test_auto_by_token(replay: tuple[Callable[[list[int]], Reading], int]) -> None:
    read, tokens = replay
    assert read(list(range(1, tokens + 1))) == ("Let me look: naïve \U0001f680.", CALLS)


@row("tool calls", '`tool_choice="auto"`: the same answer in two pieces, split at every token')
def test_auto_split(replay: tuple[Callable[[list[int]], Reading], int]) -> None:
    read, tokens = replay
    for split in range(1, tokens):
        assert read([split, tokens]) == ("Let me look: naïve \U0001f680.", CALLS), f"split at {split}"
