"""A tiny base model, rows, and specifications for the engine's tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from svc_kit.catalog import load_catalog
from tests.unit.engine.ranks import too_few_gpus_hidden
from trainer_svc.base_models import pull
from trainer_svc.engine.base_model import BaseModel, load_base_model
from trainer_svc.engine.device import make_deterministic
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.process_group import single_process
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.train import train

# What the tests compute on: a GPU where there is one, unless `CUDA_VISIBLE_DEVICES=` hides it.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


@pytest.fixture(autouse=True, scope="session")
def _as_the_engine_runs() -> None:
    """Deterministic; in one thread, since the tiny model's products are too small to share."""
    make_deterministic()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pull(load_catalog().get("tunery-tiny"), tmp_path_factory.mktemp("models"))


@pytest.fixture
def tiny(tiny_dir: Path) -> BaseModel:
    return load_base_model(tiny_dir, torch.float32, DEVICE)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Thirteen dialogs of different lengths: no multiple of the batch sizes used."""
    colours = ("red", "green", "blue")
    rows = [
        {
            "dialog": [
                {"role": "user", "content": f"What colour is the house number {n}?" + " Please." * (n % 4)},
                {"role": "assistant", "content": f"It is {colours[n % 3]}" + "!" * (n % 5)},
            ]
        }
        for n in range(13)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_spec(tiny_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., RunSpec]:
    def make(name: str = "out", **changes: Any) -> RunSpec:
        values: dict[str, Any] = {
            "base_model_dir": tiny_dir,
            "base_model_id": "tunery-tiny",
            "training_file": rows_file,
            "output_dir": tmp_path / name,
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "extras": {"dtype": "float32"},
        }
        return RunSpec.model_validate(values | changes)

    return make


@dataclass(frozen=True)
class Run:
    """A run that is over."""

    output_dir: Path
    events: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of_kind("step")]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def read_run(output_dir: Path) -> Run:
    lines = (output_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(output_dir, [json.loads(line) for line in lines])


@pytest.fixture
def run_engine() -> Callable[[RunSpec], Run]:
    """Trains in this process."""

    def run(spec: RunSpec) -> Run:
        spec.output_dir.mkdir()
        events = EventLog(spec.output_dir)
        try:
            train(spec, single_process(DEVICE), events)
        finally:
            events.close()
        return read_run(spec.output_dir)

    return run


@pytest.fixture
def run_torchrun(tmp_path: Path) -> Callable[..., tuple[int, Run]]:
    """Trains as the trainer service does: torchrun, and a process for each rank."""

    def run(spec: RunSpec, num_processes: int) -> tuple[int, Run]:
        spec_file = tmp_path / f"{spec.output_dir.name}.json"
        spec_file.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(num_processes), "-m", "trainer_svc.engine", str(spec_file)]
        services = str(Path(__file__).parents[3] / "services")
        environment = os.environ | {"PYTHONPATH": services} | too_few_gpus_hidden(num_processes)
        result = subprocess.run(command, env=environment, check=False)
        return result.returncode, read_run(spec.output_dir)

    return run
