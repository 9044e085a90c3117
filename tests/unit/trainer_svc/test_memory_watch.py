"""A run that the kernel killed for want of memory is told from one that was killed otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_svc.memory_watch import MemoryWatch


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    path = tmp_path / "memory.events"
    path.write_text("low 0\noom 3\noom_kill 2\n")
    return path


def test_a_kill_for_want_of_memory_is_seen(counter: Path, tmp_path: Path) -> None:
    watch = MemoryWatch((tmp_path / "missing", counter))
    assert not watch.kernel_has_killed
    counter.write_text("low 0\noom 4\noom_kill 3\n")
    assert watch.kernel_has_killed


def test_passes_are_halved_down_to_the_longest_row(counter: Path) -> None:
    watch = MemoryWatch((counter,))
    watch.note({"kind": "log", "tokens_per_pass": 1024, "longest_row_tokens": 300})
    watch.note({"kind": "step"})
    assert watch.smaller_passes == 512
    watch.note({"kind": "log", "tokens_per_pass": 400})
    assert watch.smaller_passes == 300
    watch.note({"kind": "log", "tokens_per_pass": 300})
    assert watch.smaller_passes is None


def test_this_machine_has_a_counter() -> None:
    assert not MemoryWatch().kernel_has_killed
