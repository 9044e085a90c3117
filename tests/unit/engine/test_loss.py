"""Loss and gradients against transformers' own, on every family that rows are packed for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from tests.unit.engine.conftest import DEVICE
from trainer_svc.engine.base_model import BaseModel, load_base_model
from trainer_svc.engine.examples import Example, load_examples
from trainer_svc.engine.loss import summed_loss
from trainer_svc.engine.packing import PACKABLE_MODEL_TYPES, group_rows, make_pack

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def reference_loss(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """transformers' own loss, each row alone: its mean times the row's targets."""
    total = torch.zeros((), device=DEVICE)
    for example in examples:
        labels = example.input_ids.where(example.is_target, -100)
        ids = example.input_ids[None].to(DEVICE)
        output = model(input_ids=ids, labels=labels[None].to(DEVICE), use_cache=False)
        total = total + output.loss * example.num_targets
    return total


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_families_are_all_tested() -> None:
    assert set(CONFIGS) == PACKABLE_MODEL_TYPES


CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("max_tokens", [0, 100, 10_000])
def test_loss_and_gradients(
    family: str, max_tokens: int, tiny: BaseModel, rows_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES)).save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    base = load_base_model(tmp_path / "model", torch.float32, DEVICE)
    assert base.packs_rows
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).to(DEVICE)
    examples = list(load_examples(rows_file, tiny.tokenizer, 200, "refuse").examples)

    expected = reference_loss(reference, examples)
    expected.backward()
    total = 0.0
    for group in group_rows(examples, max_tokens):
        loss = summed_loss(base.model, make_pack(group, DEVICE), torch.float32, packs_rows=True)
        loss.backward()
        total += float(loss.detach())

    assert total == pytest.approx(float(expected.detach()), rel=1e-6)
    expected_gradients = gradients(reference)
    ours = gradients(base.model)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=2e-5, msg=name)


def test_families_that_are_not_packed_run_row_by_row(
    tiny: BaseModel, rows_file: Path, tmp_path: Path
) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    base = load_base_model(tmp_path / "model", torch.float32, DEVICE)
    assert not base.packs_rows
    example = load_examples(rows_file, tiny.tokenizer, 200, "refuse").examples[0]
    loss = summed_loss(base.model, make_pack([example], DEVICE), torch.float32, packs_rows=False)
    expected = reference_loss(base.model, [example])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
