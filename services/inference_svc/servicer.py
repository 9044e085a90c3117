"""tunery.inference.v1.ChatService."""

from __future__ import annotations

import time
from typing import Any

import grpc
from google.api import httpbody_pb2

from inference_svc.answer import Answer, ScoredToken
from inference_svc.chat import Chat
from inference_svc.chat_request import parse_chat_request
from svc_kit.identity import current_identity
from svc_kit.ids import random_id
from tunery.inference.v1 import chat_service_pb2
from tunery.inference.v1.chat_service_pb2_grpc import ChatServiceServicer

# What OpenAI's API writes for a probability of zero: JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


class ChatServicer(ChatServiceServicer):
    """Parses, asks, converts."""

    def __init__(self, chat: Chat, max_body_bytes: int, max_answer_tokens: int) -> None:
        self._chat = chat
        self._max_body_bytes = max_body_bytes
        self._max_answer_tokens = max_answer_tokens

    async def CreateChatCompletion(
        self, request: httpbody_pb2.HttpBody, context: grpc.aio.ServicerContext
    ) -> chat_service_pb2.ChatCompletion:
        body = parse_chat_request(request.data, self._max_body_bytes, self._max_answer_tokens)
        answer = await self._chat.answer(current_identity().subject, body)
        return _completion(body.model, answer)


def _completion(model: str, answer: Answer) -> chat_service_pb2.ChatCompletion:
    choice = chat_service_pb2.ChatChoice(
        index=0,
        message=chat_service_pb2.ChatMessage(role="assistant", content=answer.text),
        finish_reason=answer.finish_reason,
    )
    if answer.tokens is not None:
        choice.logprobs.SetInParent()  # there even when the answer is empty
        for token in answer.tokens:
            choice.logprobs.content.add(
                **_scored(token),
                top_logprobs=[chat_service_pb2.TopLogprob(**_scored(likely)) for likely in token.likeliest],
            )
    return chat_service_pb2.ChatCompletion(
        id=f"chatcmpl-{random_id(24)}",
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[choice],
        usage=chat_service_pb2.ChatUsage(
            prompt_tokens=answer.num_prompt_tokens,
            completion_tokens=answer.num_answer_tokens,
            total_tokens=answer.num_prompt_tokens + answer.num_answer_tokens,
        ),
    )


def _scored(token: ScoredToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, _LOWEST_LOGPROB), "bytes": list(token.utf8)}
