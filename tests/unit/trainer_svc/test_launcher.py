"""What a run's processes are started with."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from trainer_svc.launcher import RunProcess


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["--nproc_per_node=2"], None, "4"),
        (["--nproc_per_node=64"], None, "1"),
        (["--nproc_per_node=2"], "3", "3"),
        (["--nproc_per_node=1"], None, None),  # torch takes all
        ([], None, None),
    ],
)
def test_processes_share_the_cores(
    arguments: list[str],
    given: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    start = Mock()
    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    RunProcess.start(tmp_path / "run_spec.json", arguments, tmp_path / "log")
    assert start.call_args.kwargs["env"].get("OMP_NUM_THREADS") == expected
