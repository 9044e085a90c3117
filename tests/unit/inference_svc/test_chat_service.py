"""Through gRPC: base models, adapters, whole models, who is let in, and what happens when a client goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import openai.types.chat
import pytest
import torch
from google.protobuf import json_format
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference_svc.artifacts import artifact_key
from svc_kit.errors import (
    InvalidRequest,
    LimitReached,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from svc_kit.identity import Issuer
from svc_kit.interceptors import from_rpc_error

TINY = "tunery-tiny"
PROMPT = [{"role": "user", "content": "What is blue?"}]


def as_openai(completion: Any) -> openai.types.chat.ChatCompletion:
    """Reads an answer as the openai package does: from JSON, in the shape that the gateway prints."""
    printed = json_format.MessageToDict(
        completion, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return openai.types.chat.ChatCompletion.model_validate(printed)


def plain_logprobs(model: Any, tokenizer: Any, answer_tokens: list[str]) -> torch.Tensor:
    """Scores an answer with one forward pass of plain transformers and peft. Returns (num_tokens, V)."""
    prompt = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answer = torch.tensor([answer_tokens])
    with torch.no_grad():
        logits = model.eval()(torch.cat([prompt, answer], dim=1)).logits[0]
    return torch.log_softmax(logits[prompt.shape[1] - 1 : -1].float(), dim=-1)


async def test_answer_is_what_the_openai_package_expects(stack: Any) -> None:
    completion = as_openai(await stack.ask(max_tokens=5))
    assert completion.id.startswith("chatcmpl-")
    assert len(completion.id) == len("chatcmpl-") + 24
    assert completion.object == "chat.completion"
    assert completion.model == TINY
    [choice] = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    assert completion.usage.total_tokens == 5 + completion.usage.prompt_tokens


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft's use of an old name
@pytest.mark.parametrize("kind", ["base", "lora", "full"])
async def test_logprobs_are_those_of_plain_transformers_and_peft(
    stack: Any, models_dir: Path, adapters: list[Path], full_model: Path, kind: str
) -> None:
    await stack.add_model("acct-a", "ft-lora", adapters[0])
    await stack.add_model("acct-a", "ft-full", full_model, "full")
    # Another model in between: what was loaded before must not show.
    await stack.ask("ft-full" if kind == "lora" else "ft-lora", max_tokens=1)
    asked = {"base": TINY, "lora": "ft-lora", "full": "ft-full"}[kind]
    answer = as_openai(await stack.ask(asked, max_tokens=12, logprobs=True, top_logprobs=20))

    folder = full_model if kind == "full" else models_dir / TINY
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "lora":
        model = PeftModel.from_pretrained(model, adapters[0])
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    # Greedy: the answer is plain transformers' own.
    prompt = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer_ids = generated[prompt["input_ids"].shape[1] :].tolist()
    expected_SV = plain_logprobs(model, tokenizer, answer_ids)
    for place, token in enumerate(logprobs.content):
        assert token.logprob == pytest.approx(expected_SV[place, answer_ids[place]].item(), abs=1e-4)
        likeliest = [likely.logprob for likely in token.top_logprobs]
        assert likeliest == pytest.approx(expected_SV[place].topk(20).values.tolist(), abs=1e-4)


async def test_switching_adapters_leaves_no_trace(stack: Any, adapters: list[Path]) -> None:
    for number, adapter in enumerate(adapters):
        await stack.add_model("acct-a", f"ft-{number}", adapter)
    names = [TINY, *(f"ft-{number}" for number in range(len(adapters)))]
    scores: dict[str, list[float]] = {}
    # More adapters than fit in memory (two), in an order that evicts, reloads and goes back to the base.
    for name in [*names, *reversed(names)]:
        answer = await stack.ask(name, max_tokens=4, logprobs=True)
        got = [token.logprob for token in answer.choices[0].logprobs.content]
        assert scores.setdefault(name, got) == got
    assert len({tuple(score) for score in scores.values()}) == len(names)


async def test_seed_repeats_and_its_absence_does_not(stack: Any) -> None:
    async def text(**fields: Any) -> str:
        answer = await stack.ask(max_tokens=12, temperature=1, top_p=0.95, **fields)
        return str(answer.choices[0].message.content)

    assert await text(seed=7) == await text(seed=7)
    assert len({await text(seed=7), await text(seed=8), await text(), await text()}) == 4


async def test_stop_text_ends_the_answer_and_is_no_part_of_it(stack: Any) -> None:
    whole = (await stack.ask(max_tokens=60, temperature=1, seed=3)).choices[0].message.content
    stop = whole[20:23]
    answer = await stack.ask(max_tokens=60, temperature=1, seed=3, stop=["never so", stop], logprobs=True)
    choice = answer.choices[0]
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens < 60
    written = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="replace")
    assert written.startswith(choice.message.content)
    assert len(choice.logprobs.content) <= answer.usage.completion_tokens


async def test_prompt_over_the_context_is_refused_with_the_numbers(stack: Any) -> None:
    messages = [{"role": "user", "content": "blue " * 3000}]
    with pytest.raises(InvalidRequest, match=r"`messages` has \d{4} tokens, but the model reads 2048"):
        await stack.ask(messages=messages)


async def test_answer_ends_where_the_context_does(stack: Any) -> None:
    messages = [{"role": "user", "content": "z" * 2000}]
    answer = await stack.ask(messages=messages, max_tokens=500)
    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


async def test_body_over_the_limit_is_refused(stack: Any) -> None:
    with pytest.raises(PayloadTooLarge):
        await stack.ask(messages=[{"role": "user", "content": "z" * 100_001}])


async def test_deleted_model_is_gone_at_once(stack: Any, adapters: list[Path]) -> None:
    await stack.add_model("acct-a", "ft-1", adapters[0])
    await stack.ask("ft-1", max_tokens=1)
    folder = stack.cache_dir / artifact_key("acct-a", "ft-1")
    assert folder.is_dir()
    del stack.job_svc.models["acct-a", "ft-1"]
    with pytest.raises(NotFound, match="'ft-1'"):
        await stack.ask("ft-1", max_tokens=1)
    assert not folder.exists()
    assert (await stack.ask(max_tokens=1)).model == TINY


async def test_another_accounts_model_is_not_found_and_stays(stack: Any, adapters: list[Path]) -> None:
    await stack.add_model("acct-a", "ft-1", adapters[0])
    await stack.ask("ft-1", max_tokens=1)
    with pytest.raises(NotFound, match="'ft-1'"):
        await stack.ask("ft-1", account="acct-b", max_tokens=1)
    assert (stack.cache_dir / artifact_key("acct-a", "ft-1")).is_dir()


async def test_unknown_model_and_lost_files_are_not_found(stack: Any, adapters: list[Path]) -> None:
    with pytest.raises(NotFound, match=r"'\.\./\.\./etc'"):
        await stack.ask("../../etc")
    await stack.add_model("acct-a", "ft-1", adapters[0])
    await stack.store.delete_all(
        [stored.key for stored in await stack.store.list("accounts/acct-a/models/ft-1/")]
    )
    with pytest.raises(NotFound, match="'ft-1'"):
        await stack.ask("ft-1")


async def test_base_model_answers_without_job_svc_and_a_tuned_one_does_not(stack: Any) -> None:
    await stack.stop_job_svc()
    assert (await stack.ask(max_tokens=1)).model == TINY
    with pytest.raises(Unavailable):
        await stack.ask("ft-1", max_tokens=1)


async def test_only_accounts_are_let_in(stack: Any) -> None:
    trainer = Issuer.load("trainer", stack.identity_dir).issue("trainer")
    for token, expected in ((None, Unauthenticated), ("junk", Unauthenticated), (trainer, PermissionDenied)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.call(b"{}", token)
        assert type(from_rpc_error(caught.value)) is expected


async def admitted(stack: Any, count: int) -> None:
    """Waits until so many requests are in the service."""
    async with asyncio.timeout(60):
        while stack.chat._admitted.total != count:  # noqa: ASYNC110  # the service has no event for it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stack", [1], indirect=True)
async def test_requests_over_the_limit_are_refused_and_not_kept_waiting(stack: Any) -> None:
    accounts = ("acct-a", "acct-b")
    calls = [stack.start(account=account, max_tokens=2000, stop=["never so"]) for account in accounts]
    await admitted(stack, 2)
    with pytest.raises(TooManyRequests):
        await stack.ask(max_tokens=1)
    for call in calls:
        call.cancel()
    await admitted(stack, 0)
    assert (await stack.ask(max_tokens=1)).model == TINY


@pytest.mark.parametrize("stack", [4], indirect=True)
async def test_an_account_leaves_places_to_others(stack: Any) -> None:
    calls = [stack.start(max_tokens=2000, stop=["never so"]) for _ in range(3)]
    await admitted(stack, 3)
    with pytest.raises(LimitReached, match="has 3 requests"):
        await stack.ask(max_tokens=1)
    other = stack.start(account="acct-b", max_tokens=1)
    await admitted(stack, 4)
    for call in calls:
        call.cancel()
    assert (await other).model == TINY


async def test_generation_ends_when_the_client_goes(stack: Any) -> None:
    """Two thousand tokens take tunery-tiny half a minute at the least."""
    await stack.ask(max_tokens=1)
    call = stack.start(max_tokens=2000)
    await admitted(stack, 1)
    call.cancel()
    await admitted(stack, 0)
    async with asyncio.timeout(15):
        await stack.ask(max_tokens=1)  # waits for the thread
