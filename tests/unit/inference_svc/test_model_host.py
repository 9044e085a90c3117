"""What is in memory, and that what was let go of really goes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference_svc.answer import Answer, ModelFiles
from inference_svc.chat_request import ChatRequest
from inference_svc.generation import generate
from inference_svc.model_host import ModelHost, ReadyModel
from inference_svc.token_bytes import token_bytes

FilesOf = Callable[..., ModelFiles]
REQUEST = ChatRequest.model_validate(
    {"model": "m", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
)


def answer(ready: ReadyModel, **changes: object) -> Answer:
    return generate(ready, REQUEST.model_copy(update=changes), 100, threading.Event())


def num_weights(host: ModelHost) -> int:
    [base] = host._bases.values()
    return sum(weight.numel() for weight in base.model.parameters())


def test_adapters_over_the_limit_leave_memory(tiny_files: FilesOf, adapters: list[Path]) -> None:
    host = ModelHost(max_base_models=1, max_adapters=2)
    with host.use(tiny_files()):
        num_bare = num_weights(host)
    sizes, weights = [], []
    for adapter in [*adapters, *adapters]:
        with host.use(tiny_files(adapter)) as ready:
            last = [weight for name, weight in ready.model.named_parameters() if adapter.name in name]
            weights.append([weakref.ref(weight) for weight in last])
            sizes.append(sum(weight.numel() for weight in last))
            assert {weight.dtype for weight in last} == {torch.float32}
            del last
    gc.collect()
    assert num_weights(host) == num_bare + sum(sizes[-2:])
    alive = [any(reference() is not None for reference in references) for references in weights]
    assert alive == [False] * 6 + [True] * 2
    for adapter in adapters:
        host.forget(adapter.name)
    assert num_weights(host) == num_bare
    with host.use(tiny_files(adapters[0])) as ready:
        answer(ready)


def test_one_base_model_makes_room_for_the_next(
    tiny_files: FilesOf, adapters: list[Path], full_model: Path
) -> None:
    host = ModelHost(max_base_models=1, max_adapters=2)
    with host.use(tiny_files(adapters[0])) as ready:
        first = weakref.ref(ready.model)
        del ready
    with host.use(ModelFiles("full", full_model, 2048)):
        gc.collect()
        assert first() is None
    host.forget("full")
    assert not host._bases


def test_adapter_of_an_output_head(tiny_files: FilesOf, make_adapter: Callable[..., Path]) -> None:
    host = ModelHost(max_base_models=1, max_adapters=2)
    with host.use(tiny_files()) as ready:
        bare = answer(ready, logprobs=True)
    with host.use(tiny_files(make_adapter(9, ["lm_head"]))) as ready:
        adapted = answer(ready, logprobs=True)
    assert adapted.tokens != bare.tokens
    with host.use(tiny_files()) as ready:
        assert answer(ready, logprobs=True) == bare


def test_broken_adapter_leaves_the_host_usable(
    tiny_files: FilesOf, adapters: list[Path], tmp_path: Path
) -> None:
    host = ModelHost(max_base_models=1, max_adapters=2)
    with pytest.raises(FileNotFoundError), host.use(tiny_files(tmp_path)):
        pass
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    (tmp_path / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    with pytest.raises(Exception, match="header"), host.use(tiny_files(tmp_path)):
        pass
    with host.use(tiny_files(adapters[0])) as ready:
        assert answer(ready).num_answer_tokens == 4


def test_end_token_ends_the_answer_and_is_no_part_of_it(tiny_files: FilesOf) -> None:
    with ModelHost(1, 1).use(tiny_files()) as ready:
        whole = answer(ready, logprobs=True, temperature=1.0, seed=1)
        assert whole.tokens is not None
        spelled = (token_bytes(ready.tokenizer, token_id) for token_id in range(len(ready.tokenizer)))
        third = list(spelled).index(whole.tokens[2].utf8)
        assert third not in ready.end_token_ids
        ended = answer(
            replace(ready, end_token_ids=frozenset({third})), logprobs=True, temperature=1.0, seed=1
        )
    assert ended.finish_reason == "stop"
    assert ended.num_answer_tokens == 3
    assert ended.tokens == whole.tokens[:2]


def test_generation_ends_at_the_next_token_once_the_client_is_gone(tiny_files: FilesOf) -> None:
    gone = threading.Event()
    gone.set()
    with ModelHost(1, 1).use(tiny_files()) as ready:
        assert generate(ready, REQUEST, 100, gone).num_answer_tokens == 1


def test_model_settings_of_its_own_do_not_count(tiny_files: FilesOf, tmp_path: Path) -> None:
    files = tiny_files()
    for path in files.base_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": [2, 7]}'
    )
    with ModelHost(1, 1).use(files) as ready:
        plain = answer(ready, logprobs=True)
    with ModelHost(1, 1).use(replace(files, base_dir=tmp_path)) as ready:
        assert ready.end_token_ids == {2, 7}
        assert answer(ready, logprobs=True) == plain
