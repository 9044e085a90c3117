"""What a run specification refuses, and the course of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.optimizer import learning_rate_at
from trainer_svc.engine.row_order import epoch_order
from trainer_svc.engine.run_spec import RunSpec, read_run_spec

MakeSpec = Callable[..., RunSpec]


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"epochs": 0},
        {"train_log_file": "../log"},
        {"train_log_file": "adapter_config.json"},
        {"train_log_file": "merged", "extras": {"save_merged": True}},
        {"method": {"kind": "lora", "rank": 0}},
        {"method": {"kind": "lora", "attn_modules": []}},
        {"method": {"kind": "other"}},
        {"extras": {"unknown": 1}},
        {"unknown": 1},
    ],
)
def test_refused(change: dict[str, Any], make_spec: MakeSpec) -> None:
    with pytest.raises(ValidationError):
        make_spec(**change)


def test_file_round_trip_and_broken_file(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(method={"kind": "full"}, max_steps=3)
    path = tmp_path / "spec.json"
    path.write_text(spec.model_dump_json())
    assert read_run_spec(path) == spec
    path.write_text('{"epochs": "many"}')
    with pytest.raises(
        JobFault, match=r"base_model_dir: Field required.*epochs: Input should be a valid integer"
    ):
        read_run_spec(path)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(scheduler: Any, expected: list[float]) -> None:
    rates = [
        learning_rate_at(step, peak=1.0, total_steps=6, warmup_steps=2, scheduler=scheduler)
        for step in range(1, 7)
    ]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_epoch_order() -> None:
    first = epoch_order(10, seed=1, epoch=1, shuffle=True)
    assert sorted(first) == list(range(10))
    assert first == epoch_order(10, seed=1, epoch=1, shuffle=True)
    assert first != epoch_order(10, seed=1, epoch=2, shuffle=True)
    assert epoch_order(3, seed=1, epoch=2, shuffle=False) == [0, 1, 2]
