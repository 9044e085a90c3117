"""One run of a peer, TRL's SFTTrainer or transformers' Trainer, on the engine's rows and model.

    .venv/bin/python bench/train_peers.py RUN_SPEC.json SETTINGS.json RESULT.json

Started by `train_throughput.py` in a process of its own. Tokens, targets, the adapters' first weights, the
optimizer and the order of the rows are the engine's; everything else is the peer's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from trainer_svc.engine.adapters import add_adapters
from trainer_svc.engine.examples import Example, load_examples
from trainer_svc.engine.row_order import derived_seed
from trainer_svc.engine.run_spec import LoraMethod, RunSpec, read_run_spec

IGNORED = -100


class Notes(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """When each step ended, in seconds since the epoch, its loss, and its tokens that aren't padding."""

    def __init__(self) -> None:
        self.ended_at: list[float] = []
        self.losses: list[float] = []
        self.num_tokens: list[int] = []

    def count(self, collate: Callable[[Any], dict[str, torch.Tensor]]) -> Callable[[Any], Any]:
        """The collator, with the tokens of each batch noted; a batch is a step."""

        def collate_and_count(rows: Any) -> dict[str, torch.Tensor]:
            batch = collate(rows)
            mask = batch.get("attention_mask")
            self.num_tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
            return batch

        return collate_and_count

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended_at.append(time.time())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def padded(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch as Trainer's usual collators make it: as long as its longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filling: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filling] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": column("input_ids", pad_id),
        "labels": column("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


def dataset(examples: tuple[Example, ...]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": example.input_ids.tolist(),
                "labels": example.input_ids.where(example.is_target, IGNORED).tolist(),
            }
            for example in examples
        ]
    )


def load_model(spec: RunSpec, weights_dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(spec.base_model_dir, dtype=getattr(torch, weights_dtype))
    if isinstance(spec.method, LoraMethod):
        torch.manual_seed(derived_seed(spec.seed, 0))
        return add_adapters(model, spec.method, spec.extras, spec.base_model_id)
    return model


def run(spec: RunSpec, settings: dict[str, Any]) -> Notes:
    """Trains; `settings` has `peer`, `weights_dtype`, and under `arguments` what the peer's arguments get."""
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_dir)
    longest = spec.extras.max_sequence_length or 2048
    examples = load_examples(spec.training_file, tokenizer, longest, "truncate").examples
    arguments: dict[str, Any] = {
        "output_dir": str(spec.output_dir),
        "max_steps": spec.max_steps,
        "per_device_train_batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    } | settings["arguments"]
    notes = Notes()
    model = load_model(spec, settings["weights_dtype"])
    common = {"model": model, "train_dataset": dataset(examples), "callbacks": [notes]}
    if settings["peer"] == "trl":
        trainer = SFTTrainer(
            args=SFTConfig(**({"max_length": longest} | arguments)), processing_class=tokenizer, **common
        )
    else:
        pad_id = tokenizer.pad_token_id or 0
        trainer = Trainer(
            args=TrainingArguments(bf16=True, **arguments),
            data_collator=lambda rows: padded(rows, pad_id),
            **common,
        )
    trainer.data_collator = notes.count(trainer.data_collator)
    trainer.train()
    return notes


def main(spec_file: Path, settings_file: Path, result_file: Path) -> None:
    """Runs and writes the result."""
    notes = run(read_run_spec(spec_file), json.loads(settings_file.read_text()))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    result = {
        "ended_at": notes.ended_at,
        "losses": notes.losses,
        "num_tokens": notes.num_tokens[: len(notes.ended_at)],
        "peak_device_bytes": peak,
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
