"""The hand-written layers against transformers' own, and what they leave as it was."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.unit.engine.conftest import DEVICE
from trainer_svc.engine.examples import Example
from trainer_svc.engine.layers import projection, segment_attention
from trainer_svc.engine.layers import speed_up as speed_up_module
from trainer_svc.engine.layers.compiled import compiled
from trainer_svc.engine.layers.elementwise import PLAIN
from trainer_svc.engine.layers.linear_cross_entropy import summed_cross_entropy
from trainer_svc.engine.layers.packed_weight import PackedWeight, can_be_packed
from trainer_svc.engine.layers.projection import Projection
from trainer_svc.engine.layers.speed_up import is_fast, speed_up
from trainer_svc.engine.loss import summed_loss
from trainer_svc.engine.packing import PACKABLE_MODEL_TYPES, PACKED_ATTENTION, make_pack, packed_attention

# peft's own: it warns of merging an adapter of the tied output head.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases, tied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora on attention": {"target_modules": ALL_LINEAR[:4]},
    "lora on all, rank-stabilised": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "lora on some": {"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 5},
}


def make_model(config: Any, method: dict[str, Any] | None = None) -> PreTrainedModel | PeftModel:
    """A model with random weights, none of them zero or one; the same each time."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if method is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **method))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train().to(DEVICE)


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def make_examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in lengths:
        is_target = torch.rand(length, generator=generator) < 0.5
        is_target[0] = False
        is_target[-1] = True
        examples.append(Example(torch.randint(3, 200, (length,), generator=generator), is_target))
    return examples


def padded_reference_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    """transformers' own: rows padded into one batch, its mean loss times the number of targets."""
    longest = max(example.num_tokens for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : example.num_tokens] = example.input_ids
        labels[row, : example.num_tokens] = example.input_ids.where(example.is_target, -100)
        mask[row, : example.num_tokens] = 1
    input_ids, labels, mask = (tensor.to(DEVICE) for tensor in (input_ids, labels, mask))
    output = model(input_ids=input_ids, labels=labels, attention_mask=mask, use_cache=False)
    return output.loss * sum(example.num_targets for example in examples)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        # Rounding is that of the largest entries, which the others are sums with.
        tolerance = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=tolerance, msg=name)


def loss_and_gradients(model: nn.Module, groups: list[list[Example]]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for group in groups:
        loss = summed_loss(model, make_pack(group, DEVICE), torch.float32, packs_rows=True)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of test size are then split, and the longest one's weights computed again."""
    monkeypatch.setattr(segment_attention, "_BLOCK", 16)
    monkeypatch.setattr(segment_attention, "_WHOLE_UP_TO", 24)
    monkeypatch.setattr(segment_attention, "_MULTIPLE", 8)
    monkeypatch.setattr(segment_attention, "_KEEP_WEIGHTS_UP_TO", 40)


def test_families_are_all_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == PACKABLE_MODEL_TYPES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients(family: str, method: str) -> None:
    examples = make_examples(5, 31, 12, 2, 43)
    reference = make_model(CONFIGS[family], METHODS[method])
    expected = padded_reference_loss(reference, examples)
    expected.backward()
    expected_gradients = gradients(reference)
    model = make_model(CONFIGS[family], METHODS[method])
    assert speed_up(model, torch.float32)
    for groups in ([[row] for row in examples], [examples], [examples[:2], examples[2:]]):
        loss, ours = loss_and_gradients(model, groups)
        assert loss == pytest.approx(float(expected.detach()), rel=2e-6)
        assert_same(ours, expected_gradients)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [16, 24, 25, 32, 40, 41, 80])
def test_attention_in_blocks(length: int) -> None:
    examples = make_examples(length, 7)
    reference = make_model(CONFIGS["llama"])
    expected = padded_reference_loss(reference, examples)
    expected.backward()
    model = make_model(CONFIGS["llama"])
    assert speed_up(model, torch.float32)
    loss, ours = loss_and_gradients(model, [examples])
    assert loss == pytest.approx(float(expected.detach()), rel=2e-6)
    assert_same(ours, gradients(reference))


def test_memory_of_long_rows_is_linear() -> None:
    """What attention keeps of a row grows with its length, not with the square."""

    def kept_numbers(length: int) -> int:
        rows = segment_attention.Segments.of((length,), DEVICE, torch.float32)
        _, kept = segment_attention.attend(torch.randn(length, 8, 16, device=DEVICE), 2, rows, keep=True)
        return sum(tensor.numel() for tensor in kept)

    assert kept_numbers(4096) == 2 * kept_numbers(2048)


def with_prefix(examples: list[Example], *lengths: int) -> list[Example]:
    """Rows that begin alike, for so many tokens, and go on with one of the examples."""
    prefix = torch.arange(3, 3 + max(lengths))
    rows = []
    for example, length in zip(examples, lengths, strict=True):
        is_target = torch.cat((torch.zeros(length, dtype=torch.bool), example.is_target))
        rows.append(Example(torch.cat((prefix[:length], example.input_ids)), is_target))
    return rows


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("prefix", [8, 13, 32, 45])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(family: str, prefix: int) -> None:
    rows = with_prefix(make_examples(5, 31, 2, 70), *[prefix] * 4)
    # The first token after the prefix is predicted at the prefix's last, for all rows at once.
    for row in rows:
        row.is_target[prefix] = True
    reference = make_model(CONFIGS[family], METHODS["lora on all, rank-stabilised"])
    expected = padded_reference_loss(reference, rows)
    expected.backward()
    model = make_model(CONFIGS[family], METHODS["lora on all, rank-stabilised"])
    assert speed_up(model, torch.float32)
    pack = make_pack(rows, DEVICE, share_prefix=True)
    assert (pack.shared_prefix, pack.num_tokens) == (prefix, prefix + 104)
    loss = summed_loss(model, pack, torch.float32, packs_rows=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)
    assert_same(gradients(model), gradients(reference))


def test_rows_end_before_their_last_target() -> None:
    """It is predicted there; the newline after an answer, say, is for nobody."""
    row = Example(torch.arange(3, 11), torch.tensor([0, 0, 1, 0, 1, 1, 0, 0], dtype=torch.bool))
    silent = Example(torch.arange(3, 6), torch.zeros(3, dtype=torch.bool))
    pack = make_pack([row, silent, row], DEVICE)
    assert pack.segment_lengths == (5, 1, 5)
    assert pack.input_ids.tolist() == [[3, 4, 5, 6, 7, 3, 3, 4, 5, 6, 7]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4]]
    assert pack.logit_positions.tolist() == [1, 3, 4, 7, 9, 10]
    assert pack.labels.tolist() == [5, 7, 8] * 2


def test_what_is_shared() -> None:
    """All that every row begins with, up to the first target, and never a whole row."""

    def shared(*rows: Example) -> int:
        return make_pack(rows, DEVICE, share_prefix=True).shared_prefix

    rows = with_prefix(make_examples(5, 31, 12), 20, 20, 20)
    assert shared(*rows) == 20
    assert shared(rows[0]) == 0
    assert shared(rows[0], rows[0]) == 20 + int(rows[0].is_target[20:].nonzero()[0])
    rows[1].input_ids[11] = 100
    assert shared(*rows) == 11
    rows[2].is_target[9] = True
    assert shared(*rows) == 9
    rows[2].is_target[5] = True
    assert shared(*rows) == 0  # not worth it
    assert make_pack(rows[:1] * 2, DEVICE).shared_prefix == 0


@pytest.mark.parametrize("family", CONFIGS)
def test_frozen_parts(family: str) -> None:
    """Any subset of the parameters can learn."""
    examples = make_examples(9, 20)
    names = [name for name, _ in make_model(CONFIGS[family]).named_parameters()]
    for chosen in ([n for n in names if "norm" in n], names[::3], names[1::3], names[2::3]):
        reference, model = make_model(CONFIGS[family]), make_model(CONFIGS[family])
        for name, parameter in itertools.chain(reference.named_parameters(), model.named_parameters()):
            parameter.requires_grad_(name in chosen)
        assert speed_up(model, torch.float32)
        padded_reference_loss(reference, examples).backward()
        _, ours = loss_and_gradients(model, [examples])
        assert_same(ours, gradients(reference))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_keeps_less_and_gives_the_same_bits(method: str) -> None:
    examples = make_examples(200, 100)
    kept_bytes, results = [], []
    for on in (False, True):
        model = make_model(CONFIGS["llama"], METHODS[method])
        assert speed_up(model, torch.float32)
        if on:
            inner_model(model).activation_checkpointing_enable({"use_reentrant": False})
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = summed_loss(model, make_pack(examples, DEVICE), torch.float32, packs_rows=True)
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        kept_bytes.append(sum(sizes.values()))
        loss.backward()
        results.append((float(loss.detach()), gradients(model)))
    assert kept_bytes[1] < kept_bytes[0] / 4
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


# torch warns of its own deprecated calls when it compiles.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["full", "lora on all, rank-stabilised"])
def test_compiled_layers_compute_the_same(method: str) -> None:
    results = []
    for elementwise in (PLAIN, compiled()):
        model = make_model(CONFIGS["qwen3"], METHODS[method])
        assert speed_up(model, torch.float32, elementwise)
        results.append(loss_and_gradients(model, [make_examples(5, 31, 12), make_examples(40, 30)]))
        kinds = counters["stats"]["unique_graphs"]
        loss_and_gradients(model, [make_examples(90, 3), make_examples(130, 60, 9)])
        assert counters["stats"]["unique_graphs"] == kinds  # one serves any number of tokens
    (loss, expected), (compiled_loss, ours) = results
    assert compiled_loss == pytest.approx(loss, rel=2e-6)
    assert_same(ours, expected)


@pytest.mark.filterwarnings("default")
def test_any_number_of_widths_is_compiled_in_any_thread() -> None:
    """torch's own limit is eight, and its settings are each thread's own."""
    gate_ups = [torch.randn(8, 2 * width, device=DEVICE) for width in range(4, 14)]
    layer = compiled()
    with ThreadPoolExecutor(1) as another:
        found = list(another.map(lambda gate_up: layer.swiglu_again(gate_up, None), gate_ups))
    for gate_up, hidden in zip(gate_ups, found, strict=True):
        torch.testing.assert_close(hidden, PLAIN.swiglu(gate_up)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_each_time(dtype: torch.dtype) -> None:
    examples = make_examples(40, 30)
    runs = []
    for _ in range(2):
        model = make_model(CONFIGS["llama"], METHODS["lora on attention"])
        assert speed_up(model, dtype)
        loss = summed_loss(model, make_pack(examples, DEVICE), dtype, packs_rows=True)
        loss.backward()
        runs.append((float(loss.detach()), gradients(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_near_float32(method: str) -> None:
    """Off by rounding only. transformers' own under autocast are off less here, where sums stay float32."""
    examples = make_examples(40, 30)
    reference = make_model(CONFIGS["qwen3"], METHODS[method])
    exact = padded_reference_loss(reference, examples)
    exact.backward()
    exact_gradients = gradients(reference)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        usual = padded_reference_loss(reference, examples)
    usual.backward()
    usual_gradients = gradients(reference)
    model = make_model(CONFIGS["qwen3"], METHODS[method])
    assert speed_up(model, torch.bfloat16)
    loss = summed_loss(model, make_pack(examples, DEVICE), torch.bfloat16, packs_rows=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=3e-3)

    def error(found: dict[str, Tensor]) -> float:
        difference = sum(float((found[n] - exact_gradients[n]).square().sum()) for n in exact_gradients)
        return (difference / sum(float(g.square().sum()) for g in exact_gradients.values())) ** 0.5

    assert error(gradients(model)) < 2.5 * error(usual_gradients)


def test_bfloat16_where_weights_learn_that_are_not_covered() -> None:
    """Their activations come to the attention in several number formats."""
    examples = make_examples(40, 30)
    model = make_model(LlamaConfig(**SIZES, hidden_act="gelu"))
    assert not speed_up(model, torch.bfloat16)
    exact = padded_reference_loss(model, examples)
    exact.backward()
    expected = gradients(model)
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)
    loss = summed_loss(model, make_pack(examples, DEVICE), torch.bfloat16, packs_rows=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=3e-3)
    for name, gradient in gradients(model).items():
        assert torch.dist(gradient, expected[name]) < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("config", CONFIGS)
def test_packed_weights_change_nothing(config: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(40, 30)
    runs = []
    for limit in (0, 2**30):
        monkeypatch.setattr(speed_up_module, "_PACKED_UP_TO_BYTES", limit)
        model = make_model(CONFIGS[config], METHODS[method])
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        packed = Mock(wraps=PackedWeight)
        monkeypatch.setattr(projection, "PackedWeight", packed)
        assert speed_up(model, torch.bfloat16)
        # Four products a layer, and the head.
        can_pack = can_be_packed(torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE))
        assert packed.call_count == (9 if limit and can_pack else 0)
        loss = summed_loss(model, make_pack(examples, DEVICE), torch.bfloat16, packs_rows=True)
        loss.backward()
        runs.append((float(loss.detach()), gradients(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    for name, gradient in runs[0][1].items():
        assert torch.dist(gradient, runs[1][1][name]) <= 1e-2 * gradient.norm(), name


def test_rows_never_see_each_other() -> None:
    """Another row's tokens change nothing of a row's loss, to the last bit."""
    model = make_model(CONFIGS["llama"])
    assert speed_up(model, torch.float32)
    row, other, another = make_examples(20, 33, 33)
    silent = [Example(e.input_ids, torch.zeros_like(e.is_target)) for e in (other, another)]
    with torch.no_grad():
        losses = [
            float(summed_loss(model, make_pack([first, row, last], DEVICE), torch.float32, packs_rows=True))
            for first, last in itertools.permutations(silent)
        ]
    assert losses[0] == losses[1]


def test_likely_targets_keep_their_digits_in_bfloat16() -> None:
    """A loss far below bfloat16's steps around one is still told, and still has a gradient."""
    from trainer_svc.engine.layers.linear_cross_entropy import _losses_and_gradient

    logits = torch.zeros(1, 100, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 7] = 16.0
    labels = torch.tensor([7], device=DEVICE)
    expected = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss, gradient = _losses_and_gradient(logits.clone(), labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)
    assert float(gradient[0, 7]) == pytest.approx(-float(expected), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_beyond_the_smallest_probability_have_their_loss(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 2, 3], device=DEVICE)
    logits = torch.zeros(6, 100, device=DEVICE)
    # The last two are filling.
    logits[:, 50] = torch.tensor([10.0, 88.0, 90.0, 400.0, 400.0, 0.0], device=DEVICE)
    head = nn.Linear(100, 100, bias=False)
    head.weight.data = torch.eye(100, device=DEVICE)
    hidden = logits.to(dtype, copy=True).requires_grad_()
    loss = summed_cross_entropy(hidden, labels, Projection([head]), (head.weight,), dtype)
    loss.backward()
    expected_hidden = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(expected_hidden[:4], labels, reduction="sum")
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert hidden.grad is not None
    assert expected_hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), expected_hidden.grad, rtol=1e-2, atol=1e-4)


def test_no_targets() -> None:
    model = make_model(CONFIGS["llama"])
    assert speed_up(model, torch.float32)
    row = Example(torch.tensor([3, 4, 5]), torch.zeros(3, dtype=torch.bool))
    loss = summed_loss(model, make_pack([row], DEVICE), torch.float32, packs_rows=True)
    loss.backward()
    assert float(loss.detach()) == 0


def test_the_model_is_otherwise_what_it_was(tmp_path: Path) -> None:
    plain, fast = (make_model(CONFIGS["llama"], METHODS["lora on attention"]) for _ in range(2))
    for parameter in fast.parameters():
        assert parameter.is_contiguous()
    assert speed_up(fast, torch.float32)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fast.named_parameters()]
    state, expected = fast.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ids = torch.randint(3, 200, (1, 9), device=DEVICE)
    assert torch.equal(fast(input_ids=ids).logits, plain(input_ids=ids).logits)
    fast.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merged, expected_merged = fast.merge_and_unload(), plain.merge_and_unload()
    assert torch.equal(merged(input_ids=ids).logits, expected_merged(input_ids=ids).logits)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).to(DEVICE)
    torch.testing.assert_close(again(input_ids=ids).logits, merged(input_ids=ids).logits)


@pytest.mark.parametrize(
    "change",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}],
)
def test_what_is_not_covered_stays_plain(change: dict[str, Any]) -> None:
    model = make_model(LlamaConfig(**SIZES, attention_bias=True), {"target_modules": ALL_LINEAR[:4]} | change)
    assert not speed_up(model, torch.float32)
    assert not is_fast(model)
