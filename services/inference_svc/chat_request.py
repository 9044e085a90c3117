"""The body of a chat completion, read strictly. docs/chat.md lists the same fields.

The fields are OpenAI's. One that this service doesn't know how to honour is refused and not ignored, so
that an answer never differs silently from what was asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from svc_kit.errors import InvalidRequest, PayloadTooLarge
from svc_kit.strict_json import Integer, StrictBody, nearest, parse_json_object, validate

MAX_STOP_TEXTS = 4
MAX_TOP_LOGPROBS = 20

# OpenAI's fields that are refused, with what is said about each.
_NOT_SUPPORTED = {
    "audio": "answers are text only",
    "function_call": "tools are not supported",
    "functions": "tools are not supported",
    "logit_bias": "token biases are not supported",
    "metadata": "answers are not stored",
    "modalities": "answers are text only",
    "moderation": "there is no moderation",
    "parallel_tool_calls": "tools are not supported",
    "prediction": "predicted outputs are not supported",
    "prompt_cache_key": "prompts are not cached",
    "prompt_cache_options": "prompts are not cached",
    "prompt_cache_retention": "prompts are not cached",
    "reasoning_effort": "the model answers in one way only",
    "response_format": "answers are free text",
    "safety_identifier": "`user` is the field for it",
    "service_tier": "there is one tier only",
    "store": "answers are not stored",
    "stream_options": "streaming is not supported yet",
    "tool_choice": "tools are not supported",
    "tools": "tools are not supported",
    "verbosity": "the model answers in one way only",
    "web_search_options": "the model has no tools",
}

# Where OpenAI takes null, it means the same as leaving the field out.
_NULLABLE = _NOT_SUPPORTED.keys() | {
    "frequency_penalty",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "temperature",
    "top_logprobs",
    "top_p",
    "user",
}


class _Body(StrictBody):
    @model_validator(mode="before")
    @classmethod
    def _refuse_nulls(cls, value: Any) -> Any:
        return value  # each field's own type refuses them, and then the message has the field's path


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError('expected a text, or a list of {"type": "text", "text": ...}')
    return value


def _as_texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"expected a text, or a list of up to {MAX_STOP_TEXTS}")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=256)]


class RequestMessage(_Body):
    """A message of the conversation. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(min_length=1)]

    def as_template_input(self) -> dict[str, str]:
        """Returns the message in the shape that chat templates read."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_Body):
    """A chat completion's body.

    Attributes:
        model: id of a fine-tuned model or of a base model in the catalog.
        messages: the conversation, oldest first.
        max_tokens: the answer's limit in tokens; OpenAI's older name of `max_completion_tokens`.
        max_completion_tokens: the answer's limit in tokens; None is the service's own.
        temperature: 0 always takes the likeliest token. OpenAI's default is 1; here it is 0, since a
            fine-tuned model is mostly asked for what it was taught.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: makes sampling repeatable; None draws one.
        stop: texts that end the answer, themselves left out of it.
        logprobs: whether to return the log probability of each token.
        top_logprobs: how many of the likeliest tokens to return at each place.
        user: who asked, for the client's own records; has no effect.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Integer | None = None
    stop: Annotated[list[StopText], BeforeValidator(_as_texts)] = Field([], max_length=MAX_STOP_TEXTS)
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    n: Integer = 1
    stream: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    user: str | None = None

    @field_validator("n")
    @classmethod
    def _one_answer(cls, value: int) -> int:
        if value != 1:
            raise ValueError("only one answer is made per request; leave it out or send 1")
        return value

    @field_validator("stream")
    @classmethod
    def _no_stream(cls, value: bool) -> bool:
        if value:
            raise ValueError("streaming is not supported yet; leave it out or send false")
        return value

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float) -> float:
        if value != 0:
            raise ValueError("penalties are not supported; leave it out or send 0")
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs` to be true")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and len({*limits}) > 1:
            raise ValueError(
                "`max_tokens` and `max_completion_tokens` are two names of one limit, but differ; send one"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The answer's limit in tokens, under whichever name it came."""
        return self.max_completion_tokens or self.max_tokens


def parse_chat_request(body: bytes, max_body_bytes: int, max_answer_tokens: int) -> ChatRequest:
    """Reads a chat completion's body.

    Args:
        body: UTF-8 JSON.
        max_body_bytes: the largest body that is read.
        max_answer_tokens: the longest answer that may be asked for.

    Raises:
        InvalidRequest: the body is no JSON object, repeats a key, or has a wrong, unknown or unsupported
            field; the message names it.
        PayloadTooLarge: the body has over `max_body_bytes`.
    """
    if len(body) > max_body_bytes:
        raise PayloadTooLarge(
            f"The body has {len(body)} bytes; the limit is {max_body_bytes}.", limit_bytes=max_body_bytes
        )
    fields = parse_json_object(body)
    fields = {name: value for name, value in fields.items() if value is not None or name not in _NULLABLE}
    for name in fields:
        _check_known(name)
    request = validate(ChatRequest, fields)
    if request.token_limit is not None and request.token_limit > max_answer_tokens:
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(
            f"`{field}` is {request.token_limit}; an answer has {max_answer_tokens} tokens at most here.",
            field=field,
        )
    return request


def _check_known(name: str) -> None:
    if name in _NOT_SUPPORTED:
        raise InvalidRequest(f"`{name}` is not supported: {_NOT_SUPPORTED[name]}. Leave it out.", field=name)
    known = list(ChatRequest.model_fields)
    if name not in known:
        raise InvalidRequest(f"`{name}` is not a known field{nearest(name, known)}.", field=name)
