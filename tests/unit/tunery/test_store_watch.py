from __future__ import annotations

from pathlib import Path

import pytest

from tunery import store_watch
from tunery.store_watch import StoreWatch

REFUSAL = "insert entry /buckets/a/b: write ../data/filerldb2/07/000001.log: no space left on device\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "s3.log"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether there is room at each look, the next one first."""
    answers: list[bool] = []
    monkeypatch.setattr(store_watch, "_has_room", lambda _folder: answers.pop(0) if answers else True)
    return answers


def say(log: Path, words: str) -> None:
    with log.open("a") as file:
        file.write(words)


def test_a_refusal_where_there_was_room_all_the_while(log: Path, tmp_path: Path) -> None:
    watch = StoreWatch(log, tmp_path)
    assert not watch.is_stuck()
    say(log, "all is well\n")
    assert not watch.is_stuck()
    say(log, REFUSAL)
    assert watch.is_stuck()
    assert not watch.is_stuck()


def test_another_full_disk_is_not_the_stores(log: Path, tmp_path: Path) -> None:
    watch = StoreWatch(log, tmp_path)
    assert not watch.is_stuck()
    say(log, "write /tmp/upload-7: no space left on device\n")
    assert not watch.is_stuck()


def test_a_refusal_of_a_former_run_is_none(log: Path, tmp_path: Path) -> None:
    say(log, REFUSAL)
    watch = StoreWatch(log, tmp_path)
    assert not watch.is_stuck()
    assert not watch.is_stuck()


@pytest.mark.parametrize("looks", [[True, False], [False, True], [False, False]])
def test_a_refusal_by_a_full_disk_is_right(
    looks: list[bool], log: Path, tmp_path: Path, room: list[bool]
) -> None:
    watch = StoreWatch(log, tmp_path)
    room += looks
    assert not watch.is_stuck()
    say(log, REFUSAL)
    assert not watch.is_stuck()


def test_a_log_that_was_moved_aside_is_read_from_its_start(log: Path, tmp_path: Path) -> None:
    say(log, "x" * 1000)
    watch = StoreWatch(log, tmp_path)
    assert not watch.is_stuck()
    log.write_text(REFUSAL)
    assert watch.is_stuck()


def test_a_disk_has_room(tmp_path: Path) -> None:
    assert store_watch._has_room(tmp_path)
