"""Packs computed several at once: the same sums as one after the other, the same bits each time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from random import Random

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer_svc.engine.examples import Example
from trainer_svc.engine.layers.speed_up import speed_up
from trainer_svc.engine.packing import group_rows
from trainer_svc.engine.passes import Passes

CONFIG = LlamaConfig(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
LENGTHS = (90, 20, 310, 45, 7, 160, 33, 80)


def make_examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in lengths:
        is_target = torch.rand(length, generator=generator) < 0.5
        is_target[0] = False
        is_target[-1] = True
        examples.append(Example(torch.randint(3, 200, (length,), generator=generator), is_target))
    return examples


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def make_passes(*, fast: bool = True) -> tuple[nn.Module, Passes]:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG).train()
    if fast:
        assert speed_up(model, torch.float32)
    return model, Passes(
        model, list(model.parameters()), torch.device("cpu"), dtype=torch.float32, packs_rows=fast
    )


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_rows_go_where_the_model_computes() -> None:
    """Its weights may lie in the host's memory, where they are kept between uses."""
    model = AutoModelForCausalLM.from_config(CONFIG)
    device = torch.device("meta")
    passes = Passes(model, (), device, dtype=torch.float32, packs_rows=False)
    [pack] = passes.split(make_examples(LENGTHS[0]))
    assert {pack.input_ids.device, pack.labels.device} == {device}


@pytest.mark.usefixtures("four_threads")
def test_several_at_once_are_one_after_the_other() -> None:
    rows = make_examples(*LENGTHS)
    num_targets = sum(row.num_targets for row in rows)
    model, passes = make_passes()
    packs = passes.split(rows)
    assert len(packs) == 4
    first = passes.add_gradients(packs, num_targets)
    first_gradients = gradients(model)
    for _ in range(5):
        assert passes.add_gradients(packs, num_targets) == first
        assert all(map(torch.equal, gradients(model), first_gradients))
    one_by_one = sum(passes.add_gradients([pack], num_targets) for pack in packs)
    assert first == pytest.approx(one_by_one, rel=1e-6)
    for ours, expected in zip(first_gradients, gradients(model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
    assert passes.summed_loss(packs) / num_targets == pytest.approx(first, rel=1e-6)
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_the_usual_layers_run_one_after_the_other() -> None:
    """Dropout in threads would draw its numbers in any order."""
    rows = make_examples(*LENGTHS)
    model, passes = make_passes(fast=False)
    assert [len(pack.segment_lengths) for pack in passes.split(rows)] == [1] * len(rows)
    fast_model, fast_passes = make_passes()
    expected = passes.add_gradients(passes.split(rows), 10)
    assert fast_passes.add_gradients(fast_passes.split(rows), 10) == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(gradients(fast_model), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("four_threads")
def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = make_passes()
    packs = passes.split(make_examples(*LENGTHS))
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TypeError, match="not callable"):
        passes.add_gradients(packs, 1)


def test_no_packs() -> None:
    """A process may have no rows in a step."""
    model, passes = make_passes()
    assert passes.split([]) == []
    assert passes.add_gradients([], 5) == 0
    assert passes.summed_loss([]) == 0
    assert gradients(model) == []


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "multiple_of", "expected"),
    [
        ((5, 5, 5, 5), 10, 1, [[0, 1], [2, 3]]),
        ((9, 1, 1, 9), 10, 1, [[0, 1], [2, 3]]),
        ((7, 6, 5, 4, 4), 20, 2, [[0, 1], [2, 3, 4]]),  # the longest first would give 15 and 11
        ((30, 5, 5), 10, 1, [[0], [1, 2]]),
        ((3, 3, 3, 3), 100, 2, [[0, 2], [1, 3]]),
        ((6, 6, 6, 6, 6), 10, 2, [[0], [1], [2], [3], [4]]),
        ((4, 4, 4), 0, 1, [[0], [1], [2]]),
        ((4,), 100, 4, [[0]]),
    ],
)
def test_groups(
    lengths: tuple[int, ...], max_tokens: int, multiple_of: int, expected: list[list[int]]
) -> None:
    # The last token is a target, which isn't read.
    examples = make_examples(*(length + 1 for length in lengths))
    groups = group_rows(examples, max_tokens, multiple_of)
    places = [[next(i for i, e in enumerate(examples) if e is x) for x in group] for group in groups]
    assert sorted(itertools.chain(*places)) == list(range(len(lengths)))
    assert all(len(g) == 1 or sum(lengths[i] for i in g) <= max_tokens for g in places)
    assert sorted(sorted(lengths[i] for i in g) for g in places) == sorted(
        sorted(lengths[i] for i in g) for g in expected
    )
    assert places == sorted(places)


def groups_one_by_one(lengths: Sequence[int], room: int, multiple_of: int) -> list[list[int]]:
    """What `group_rows` does, in so many words."""
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    short = [length for length in lengths if length <= room]
    fewest = max(1, len(lengths) - len(short) + math.ceil(sum(short) / max(room, 1)))

    def size(group: list[int]) -> int:
        return sum(lengths[index] for index in group)

    for count in range(math.ceil(fewest / multiple_of) * multiple_of, len(lengths) + 1, multiple_of):
        groups: list[list[int]] = [[] for _ in range(count)]
        for index in longest_first:
            min(groups, key=size).append(index)
        while True:
            largest = max(groups, key=size)
            swaps = [
                (max(size(largest) - moved, size(group) + moved), other, here, there)
                for other, group in enumerate(groups)
                for here, there in itertools.product(range(len(largest)), range(len(group)))
                if (moved := lengths[largest[here]] - lengths[group[there]]) > 0
            ]
            if not swaps or min(swaps)[0] >= size(largest):
                break
            _, other, here, there = min(swaps)
            largest[here], groups[other][there] = groups[other][there], largest[here]
        if all(len(group) == 1 or size(group) <= room for group in groups):
            return sorted(map(sorted, groups))
    return [[index] for index in range(len(lengths))]


def test_groups_are_those_of_the_plain_way() -> None:
    random = Random(3)
    for _ in range(300):
        lengths = [random.randint(1, random.choice((5, 40))) for _ in range(random.randint(1, 30))]
        max_tokens, multiple_of = random.randint(0, 90), random.randint(1, 4)
        # The last token is a target, which isn't read.
        examples = make_examples(*(length + 1 for length in lengths))
        numbers = {id(example): number for number, example in enumerate(examples)}
        groups = group_rows(examples, max_tokens, multiple_of)
        assert [[numbers[id(example)] for example in group] for group in groups] == groups_one_by_one(
            lengths, max_tokens, multiple_of
        )


@pytest.mark.parametrize(("max_tokens", "multiple_of"), [(1024, 2), (8192, 1), (300, 2), (0, 1)])
def test_many_rows_are_grouped_in_no_time(max_tokens: int, multiple_of: int) -> None:
    random = Random(3)
    examples = make_examples(*(random.randint(20, 400) for _ in range(8192)))
    started_at = time.process_time()
    groups = group_rows(examples, max_tokens, multiple_of)
    assert time.process_time() - started_at < 2  # where a minute went once
    assert sum(map(len, groups)) == 8192


def test_groups_count_a_shared_prefix_once() -> None:
    prefix = Example(torch.arange(3, 23), torch.zeros(20, dtype=torch.bool))
    rows = [
        Example(torch.cat((prefix.input_ids, row.input_ids)), torch.cat((prefix.is_target, row.is_target)))
        for row in make_examples(6, 11)
    ]
    assert len(group_rows(rows, 55, share_prefix=False)) == 1
    assert len(group_rows(rows, 54, share_prefix=False)) == 2
    assert len(group_rows(rows, 35, share_prefix=True)) == 1
    assert len(group_rows(rows, 34, share_prefix=True)) == 2
    assert group_rows([], 10, share_prefix=True) == []
