"""Makes an answer: the prompt by the model's chat template, tokens by transformers' `generate`.

Shapes: V vocabulary.
"""

from __future__ import annotations

import bisect
import secrets
import threading
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from inference_svc.answer import Answer, AnswerToken, ScoredToken
from inference_svc.chat_request import ChatRequest
from inference_svc.model_host import ReadyModel
from inference_svc.token_bytes import token_bytes
from svc_kit.errors import InvalidRequest

# Below it, logits divided by the temperature could overflow; the likeliest token has all the
# probability long before.
_GREEDY_TEMPERATURE = 1e-4
# Tokens that decode to nothing can stand between those of a stop text.
_SPARE_TAIL_TOKENS = 16


def generate(
    ready: ReadyModel, request: ChatRequest, max_answer_tokens: int, gone: threading.Event
) -> Answer:
    """Answers a conversation.

    Args:
        ready: the model.
        request: the conversation and the settings.
        max_answer_tokens: the limit where the request has none.
        gone: once set, generation ends at the next token and what there is comes back.

    Raises:
        InvalidRequest: the model's chat template refuses the conversation, or it fills the context.
    """
    prompt_ids = _prompt_ids(ready, request)
    num_prompt_tokens = prompt_ids.shape[1]
    num_free = ready.context_length - num_prompt_tokens
    if num_free < 1:
        raise InvalidRequest(
            f"`messages` has {num_prompt_tokens} tokens, but the model reads {ready.context_length} with its "
            "answer; shorten the conversation.",
            field="messages",
            prompt_tokens=num_prompt_tokens,
            context_length=ready.context_length,
        )
    max_new_tokens = min(request.token_limit or max_answer_tokens, num_free)
    recorder = _Recorder(request.top_logprobs) if request.logprobs else None
    end = _AnswerEnd(ready.tokenizer, request.stop, gone, recorder)
    # Always seeded, or an answer without a seed would follow from the seed of the one before.
    torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
    ready.model.generate(  # type: ignore[operator]  # a mixin of every causal model
        prompt_ids.to(ready.model.device),
        attention_mask=torch.ones_like(prompt_ids).to(ready.model.device),
        generation_config=_generation_config(ready, request, max_new_tokens),
        logits_processor=LogitsProcessorList([] if recorder is None else [recorder]),
        stopping_criteria=StoppingCriteriaList([end]),
    )
    return _answer(ready, request, num_prompt_tokens, end.answer_ids, recorder)


def _prompt_ids(ready: ReadyModel, request: ChatRequest) -> Tensor:
    if ready.tokenizer.chat_template is None:
        raise InvalidRequest(
            "The model has no chat template, so it can't answer conversations; take an instruct model.",
            field="model",
        )
    try:
        encoded: Any = ready.tokenizer.apply_chat_template(
            [message.as_template_input() for message in request.messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # a prompt that is too long is an error here, not a warning
        )
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"`messages`: the model's chat template refuses the conversation: {error}.", field="messages"
        ) from error
    prompt_ids = encoded["input_ids"]
    assert isinstance(prompt_ids, Tensor)
    return prompt_ids


def _generation_config(ready: ReadyModel, request: ChatRequest, max_new_tokens: int) -> GenerationConfig:
    end_token_ids = sorted(ready.end_token_ids)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_ids,
        pad_token_id=end_token_ids[0],  # never used: there is one row
        do_sample=False,
        use_cache=True,
    )
    if request.temperature >= _GREEDY_TEMPERATURE:
        # top_k is 50 unless it is switched off.
        config.update(do_sample=True, temperature=request.temperature, top_p=request.top_p, top_k=0)
    return config


class _Recorder(LogitsProcessor):
    """Keeps the log probabilities of each token, as the model gives them."""

    def __init__(self, num_likeliest: int) -> None:
        self._num_likeliest = num_likeliest
        self._logprobs_V = torch.empty(0)
        self.logprobs: list[float] = []
        self.likeliest: list[list[tuple[int, float]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # transformers runs a caller's processors before temperature and top_p.
        self._logprobs_V = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def record(self, token_id: int) -> None:
        """Takes note of the token that was chosen."""
        self.logprobs.append(float(self._logprobs_V[token_id]))
        values, ids = torch.topk(self._logprobs_V, self._num_likeliest)
        self.likeliest.append(list(zip(ids.tolist(), values.tolist(), strict=True)))


class _AnswerEnd(StoppingCriteria):
    """Sees each new token, and ends the answer at a stop text or when the client has gone."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: list[str],
        gone: threading.Event,
        recorder: _Recorder | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token is a byte at least, so a stop text that has just come is among so many last tokens.
        self._num_tail = max((len(text.encode()) for text in stop), default=0) + _SPARE_TAIL_TOKENS
        self._gone = gone
        self._recorder = recorder
        self.answer_ids: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.answer_ids.append(int(input_ids[0, -1]))
        if self._recorder is not None:
            self._recorder.record(self.answer_ids[-1])
        is_end = self._gone.is_set() or (bool(self._stop) and self._stop_text_came())
        return torch.tensor([is_end], device=input_ids.device)

    def _stop_text_came(self) -> bool:
        # The whole answer is read only when its tail looks like the end, or long answers would take
        # time in the square of their length.
        tail = _decode(self._tokenizer, self.answer_ids[-self._num_tail :])
        return any(text in tail for text in self._stop) and (
            _find_first(_decode(self._tokenizer, self.answer_ids), self._stop) is not None
        )


def _answer(
    ready: ReadyModel,
    request: ChatRequest,
    num_prompt_tokens: int,
    answer_ids: list[int],
    recorder: _Recorder | None,
) -> Answer:
    tokenizer = ready.tokenizer
    has_ended = answer_ids[-1] in ready.end_token_ids
    kept_ids = answer_ids[:-1] if has_ended else answer_ids
    text = _decode(tokenizer, kept_ids)
    cut = _find_first(text, request.stop)
    if cut is not None:
        text = text[:cut]
        # As many tokens as it takes to write the text; the last may also begin the stop text.
        num_kept = bisect.bisect_left(
            range(len(kept_ids)), cut, key=lambda count: len(_decode(tokenizer, kept_ids[:count]))
        )
        kept_ids = kept_ids[:num_kept]
    tokens = None
    if recorder is not None:
        tokens = tuple(
            AnswerToken(
                token_bytes(tokenizer, token_id),
                recorder.logprobs[place],
                tuple(
                    ScoredToken(token_bytes(tokenizer, likely_id), logprob)
                    for likely_id, logprob in recorder.likeliest[place]
                ),
            )
            for place, token_id in enumerate(kept_ids)
        )
    return Answer(
        text=text,
        finish_reason="stop" if has_ended or cut is not None else "length",
        num_prompt_tokens=num_prompt_tokens,
        num_answer_tokens=len(answer_ids),
        tokens=tokens,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _find_first(text: str, stop: list[str]) -> int | None:
    """Where the first of the stop texts begins; None where there is none."""
    return min((place for stop_text in stop if (place := text.find(stop_text)) >= 0), default=None)
