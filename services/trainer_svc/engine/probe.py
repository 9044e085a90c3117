"""Measures a base model on this machine: `python -m trainer_svc.engine.probe MODEL_DIR METHOD DTYPE OUT`.

A few steps of made-up rows, of different sizes, tell the time of a step as such, of a token and of a target,
and the memory of the model and of a token. From these follows what a job will take (`job_svc/estimate.py`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from trainer_svc.engine.device import peak_memory_bytes, total_memory_bytes
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.examples import Example
from trainer_svc.engine.gradients import GradientComputer
from trainer_svc.engine.process_group import single_process
from trainer_svc.engine.run_spec import TOKENS_PER_PASS, Extras, LoraMethod, Method, RunSpec
from trainer_svc.engine.setup import Workload, prepare

Kind = Literal["lora", "full"]
Dtype = Literal["auto", "bfloat16", "float32"]

# What most jobs train: the figures of other ranks and matrices are near.
_LORA = LoraMethod(rank=16, alpha=32, apply_to_mlp=True)
_ROW_TOKENS = 128
_REPETITIONS = 3
_ENOUGH_SECONDS = 3.0
_SHORT_STEP_SECONDS = 0.2
# The CPU's library keeps something for each size of product that it comes to see; a few steps don't show it.
_KEPT_FOR_SIZES_BYTES = 0.4 * 2**30
_PATIENCE_SECONDS = 30
_IDLE_PERCENT = 20


class Probe(BaseModel):
    """What was measured.

    Attributes:
        startup_seconds: from the process's start until the first step can begin.
        load_seconds: of that, loading the model.
        seconds_per_step: of a step as such, the optimizer's part above all.
        seconds_per_token: for each input token of a step.
        seconds_per_target: for each target token, on top of that.
        base_memory_bytes: of weights, optimizer state and all else that is there without a row.
        bytes_per_token: for each token of one pass, on top of that.
        total_memory_bytes: what the device has.
        tokens_per_pass: most tokens that a run computes at once, a longer row aside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    startup_seconds: float
    load_seconds: float
    seconds_per_step: float
    seconds_per_token: float
    seconds_per_target: float
    base_memory_bytes: float
    bytes_per_token: float
    total_memory_bytes: float
    tokens_per_pass: int


def measure(base_model_dir: Path, kind: Kind, dtype: Dtype) -> Probe:
    """Takes a few steps.

    Args:
        base_model_dir: transformers folder of the base model.
        kind: what is trained.
        dtype: of the matrix products.

    Raises:
        JobFault: the base model can't be loaded.
    """
    method: Method = TypeAdapter(Method).validate_python({"kind": kind}) if kind == "full" else _LORA
    import_seconds = time.time() - psutil.Process().create_time()
    group = single_process()
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.jsonl"
        rows_file.write_text(json.dumps({"text": "A row."}) + "\n", encoding="utf-8")
        spec = RunSpec(
            base_model_dir=base_model_dir,
            base_model_id="probed",
            training_file=rows_file,
            output_dir=Path(scratch),
            method=method,
            extras=Extras(dtype=dtype),
        )
        events = EventLog(Path(scratch), silent=True)
        _wait_until_idle()
        started_at = time.perf_counter()
        workload = prepare(spec, group, events)
        load_seconds = time.perf_counter() - started_at
        gradients = GradientComputer(spec, group, events, workload)

        def step(rows: list[Example]) -> float:
            return _least_seconds(lambda: _take_step(gradients, workload, rows))

        tokens_per_pass = TOKENS_PER_PASS[group.device.type]
        one = _rows(workload, 1, all_targets=False)
        _take_step(gradients, workload, one)  # the optimizer makes its state in its first step
        base_memory = float(peak_memory_bytes(group.device))
        seconds_one, num_rows = step(one), 4
        seconds_all = step(_rows(workload, num_rows, all_targets=False))
        seconds_targets = step(_rows(workload, num_rows, all_targets=True))
        memory = float(peak_memory_bytes(group.device))
        if seconds_all <= _SHORT_STEP_SECONDS:
            # The machine's noise is as long as what four rows take, and a GPU has hardly begun.
            num_rows = max(64, tokens_per_pass // _ROW_TOKENS)
            seconds_all = step(_rows(workload, num_rows, all_targets=False))
            seconds_targets = step(_rows(workload, num_rows, all_targets=True))
    kept_for_sizes = _KEPT_FOR_SIZES_BYTES if group.device.type == "cpu" else 0.0
    per_token = max(seconds_all - seconds_one, 0.0) / ((num_rows - 1) * _ROW_TOKENS)
    return Probe(
        startup_seconds=import_seconds + load_seconds,
        load_seconds=load_seconds,
        seconds_per_step=max(seconds_one - per_token * _ROW_TOKENS, 0.0),
        seconds_per_token=per_token,
        seconds_per_target=max(seconds_targets - seconds_all, 0.0) / (num_rows * _ROW_TOKENS),
        base_memory_bytes=base_memory + kept_for_sizes,
        bytes_per_token=max(memory - base_memory, 0.0) / (3 * _ROW_TOKENS),
        total_memory_bytes=float(total_memory_bytes(group.device)),
        tokens_per_pass=tokens_per_pass,
    )


def _wait_until_idle() -> None:
    """Waits a while for others to leave the processor: what they take would count as the model's."""
    for _ in range(_PATIENCE_SECONDS):
        if psutil.cpu_percent(interval=1) < _IDLE_PERCENT:
            return


def _rows(workload: Workload, num_rows: int, *, all_targets: bool) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = workload.base.config.vocab_size
    is_target = torch.full((_ROW_TOKENS,), all_targets)
    is_target[0], is_target[-1] = False, True
    return [
        Example(torch.randint(vocabulary, (_ROW_TOKENS,), generator=generator), is_target)
        for _ in range(num_rows)
    ]


def _take_step(gradients: GradientComputer, workload: Workload, rows: list[Example]) -> None:
    gradients.compute(rows, 1)
    workload.optimizer.step()
    workload.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _least_seconds(work: Callable[[], None]) -> float:
    """The least of a few: whatever else the machine does can only add to it."""
    seconds: list[float] = []
    while len(seconds) < _REPETITIONS and sum(seconds) < _ENOUGH_SECONDS:
        started_at = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds)


def main(arguments: list[str]) -> int:
    """Measures, and writes the figures as JSON. Returns the exit code."""
    if len(arguments) != 4:
        print(
            "usage: python -m trainer_svc.engine.probe MODEL_DIR lora|full auto|bfloat16|float32 OUT.json",
            file=sys.stderr,
        )
        return 2
    folder, kind, dtype, out = arguments
    probe = measure(
        Path(folder),
        TypeAdapter(Kind).validate_python(kind),
        TypeAdapter(Dtype).validate_python(dtype),
    )
    Path(out).write_text(probe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
