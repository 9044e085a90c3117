"""A memory that is too small: smaller passes, the same result. Only a row that doesn't fit ends the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.unit.engine.conftest import DEVICE, needs_gpu, read_run
from tests.unit.engine.ranks import in_ranks
from trainer_svc.engine import __main__ as engine_main
from trainer_svc.engine import passes
from trainer_svc.engine.device import free_unused_memory, is_out_of_memory, total_memory_bytes
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets no pass of more tokens through, as a full memory would; returns the passes that were tried."""

    def limit(num_tokens: int) -> list[int]:
        real = passes.summed_loss
        tried: list[int] = []

        def limited(model: Any, pack: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            tried.append(pack.num_tokens)
            loss = real(model, pack, *args, **kwargs)
            if pack.num_tokens > num_tokens:
                loss.backward()  # leaves gradients behind, as an overflow in the backward pass does
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

        monkeypatch.setattr(passes, "summed_loss", limited)
        return tried

    return limit


def test_smaller_passes_change_no_result(make_spec: MakeSpec, run_engine: Any, memory_for: Any) -> None:
    roomy = run_engine(make_spec("roomy"))
    tried = memory_for(80)
    tight = run_engine(make_spec("tight"))

    assert max(tried) > 80
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-5)
    [said, *_] = [event for event in tight.of_kind("log") if "out of memory" in event["message"]]
    assert said["tokens_per_pass"] < max(tried)
    # Once it is known, the run doesn't fail into it again.
    assert all(tokens <= 80 for tokens in tried[-4:])


@needs_gpu
def test_a_full_gpu(make_spec: MakeSpec, run_engine: Any, tmp_path: Path) -> None:
    """No error is made up here: the GPU's memory is limited to less than a pass takes."""
    rows_file = tmp_path / "long_rows.jsonl"
    rows_file.write_text("".join(json.dumps({"text": f"Row {n}. " * 50}) + "\n" for n in range(64)))
    changes = {"training_file": rows_file, "batch_size": 64, "epochs": 3}
    free_unused_memory(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    roomy = run_engine(make_spec("roomy", **changes))
    taken = torch.cuda.max_memory_reserved() - before
    free_unused_memory(DEVICE)
    limit = torch.cuda.memory_reserved() + 0.7 * taken
    torch.cuda.set_per_process_memory_fraction(limit / total_memory_bytes(DEVICE))
    try:
        tight = run_engine(make_spec("tight", **changes))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event for event in tight.of_kind("log") if "out of memory" in event["message"]]
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-4)


def test_validation_gets_smaller_passes_too(
    make_spec: MakeSpec, run_engine: Any, monkeypatch: pytest.MonkeyPatch, rows_file: Path
) -> None:
    roomy = run_engine(make_spec("roomy", batch_size=13, validation_file=rows_file, epochs=1))
    real = passes.summed_loss

    def limited(model: Any, pack: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not model.training and pack.num_tokens > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(model, pack, *args, **kwargs)

    monkeypatch.setattr(passes, "summed_loss", limited)
    tight = run_engine(make_spec("tight", batch_size=13, validation_file=rows_file, epochs=1))
    assert tight.of_kind("validation")[0]["loss"] == pytest.approx(
        roomy.of_kind("validation")[0]["loss"], rel=1e-5
    )


def test_one_row_that_does_not_fit_ends_the_run(
    make_spec: MakeSpec, run_engine: Any, memory_for: Any
) -> None:
    memory_for(10)
    with pytest.raises(JobFault, match=r"too small even for one row of \d+ tokens"):
        run_engine(make_spec())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes don't match"), False),
    ],
)
def test_errors_of_a_full_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def fail_in_the_second_process(group: ProcessGroup, spec: RunSpec) -> None:
    if group.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_main, "_FIRST_RANK_REPORTS_SECONDS", 0.1)
            patch.setattr(passes, "summed_loss", Mock(side_effect=torch.OutOfMemoryError("full")))
            os._exit(engine_main.run(spec, group))
    engine_main.run(spec, group)


def test_a_second_processs_full_memory_is_told_of(make_spec: MakeSpec) -> None:
    """The first one waits for it meanwhile, and knows nothing."""
    spec = make_spec(method={"kind": "full", "activation_checkpointing": False})
    assert not in_ranks(2, fail_in_the_second_process, spec)
    [failed, *_] = read_run(spec.output_dir).of_kind("failed")
    assert failed["fault"] == "memory"
    assert failed["tokens_per_pass"] > 0


def test_other_errors_pass(make_spec: MakeSpec, run_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(passes, "summed_loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_engine(make_spec())
