"""What bodies are taken, and what is said of the others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import completion_create_params

from inference_svc import chat_request
from inference_svc.chat_request import ChatRequest, parse_chat_request
from svc_kit.errors import InvalidRequest, PayloadTooLarge

USER = {"role": "user", "content": "hi"}
DOCS = Path(__file__).parents[3] / "docs" / "chat.md"


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), 10_000, 2048)


def test_least_body_has_documented_defaults() -> None:
    request = parse()
    assert (request.temperature, request.top_p, request.stop, request.seed) == (0, 1, [], None)
    assert (request.token_limit, request.logprobs, request.top_logprobs) == (None, False, 0)


def test_content_is_text_or_parts_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    )
    assert [message.as_template_input() for message in request.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
    ]


def test_null_is_as_good_as_absent_where_openai_takes_it() -> None:
    assert parse(**dict.fromkeys(chat_request._NULLABLE)) == parse()


def test_neutral_values_and_both_names_of_the_limit_are_taken() -> None:
    request = parse(n=1.0, stream=False, presence_penalty=0, frequency_penalty=0, user="u", stop="x")
    assert request.stop == ["x"]
    assert parse(max_tokens=5).token_limit == parse(max_completion_tokens=5).token_limit == 5
    assert parse(max_tokens=5, max_completion_tokens=5).token_limit == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, r"`model`"),
        ({"model": 3}, r"`model`"),
        ({"messages": []}, r"`messages`"),
        ({"messages": "hi"}, r"`messages`"),
        ({"messages": ["hi"]}, r"`messages\[0\]`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"`messages\[0\]\.role`.*'assistant'.*\"tool\""),
        ({"messages": [USER, {"role": "user"}]}, r"`messages\[1\]\.content` is missing"),
        ({"messages": [{"role": "user", "content": None}]}, r"`messages\[0\]\.content`"),
        ({"messages": [{"role": "user", "content": []}]}, r"`messages\[0\]\.content`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            r"`messages\[0\]\.content\[0\]\.type`",
        ),
        ({"messages": [{**USER, "name": "bob"}]}, r"`messages\[0\]\.name` is not a known field"),
        ({"temperature": 2.1}, r"`temperature`"),
        ({"temperature": "1"}, r"`temperature`"),
        ({"temperature": True}, r"`temperature`"),
        ({"top_p": -0.1}, r"`top_p`"),
        ({"n": 2}, r"`n`: only one"),
        ({"stream": True}, r"`stream`: streaming is not supported yet"),
        ({"stream_options": {}}, r"`stream_options` is not supported"),
        ({"tools": []}, r"`tools` is not supported"),
        ({"presence_penalty": 0.1}, r"`presence_penalty`"),
        ({"frequency_penalty": -1}, r"`frequency_penalty`"),
        ({"max_tokens": 0}, r"`max_tokens`"),
        ({"max_tokens": 1.5}, r"`max_tokens`"),
        ({"max_tokens": 2049}, r"`max_tokens` is 2049.* 2048"),
        ({"max_completion_tokens": 2049}, r"`max_completion_tokens` is 2049"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, r"`max_tokens` and `max_completion_tokens`"),
        ({"stop": ""}, r"`stop\[0\]`"),
        ({"stop": ["a"] * 5}, r"`stop`"),
        ({"stop": {"a": 1}}, r"`stop`"),
        ({"logprobs": 1}, r"`logprobs`"),
        ({"top_logprobs": 2}, r"`top_logprobs` needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, r"`top_logprobs`"),
        ({"seed": "x"}, r"`seed`"),
        ({"temprature": 1}, r"`temprature` is not a known field \(did you mean `temperature`\?\)"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(**fields)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[]", "an object was expected"),
        (b'"hi"', "an object was expected"),
        (b'{"model": "a", "model": "b"}', "`model` is there twice"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
    ],
)
def test_bodies_that_are_no_object_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_chat_request(body, 10_000, 2048)


def test_large_bodies_are_refused_unread() -> None:
    with pytest.raises(PayloadTooLarge, match="10001 bytes; the limit is 10000"):
        parse_chat_request(b"x" * 10_001, 10_000, 2048)


def test_every_field_of_openai_is_taken_or_refused_by_name() -> None:
    openai_fields = set(completion_create_params.CompletionCreateParamsNonStreaming.__annotations__)
    openai_fields |= set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert openai_fields - set(ChatRequest.model_fields) == set(chat_request._NOT_SUPPORTED)


def test_docs_list_every_field() -> None:
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text(encoding="utf-8")))
    assert set(ChatRequest.model_fields) | set(chat_request._NOT_SUPPORTED) <= documented
