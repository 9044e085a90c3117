"""Processes and the devices that they find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.train import train


def test_each_process_needs_a_gpu_where_there_are_any(
    make_spec: type[RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is the job's fault: another attempt would end the same way."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    group = ProcessGroup(0, 2, torch.device("cuda", 0))
    with pytest.raises(JobFault, match=r"nproc_per_node is 2, but this trainer has 1 GPU, .* lower it"):
        train(make_spec(), group, EventLog(tmp_path, silent=True))
