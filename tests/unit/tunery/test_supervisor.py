"""Logs of processes that run for months."""

from __future__ import annotations

from pathlib import Path

from tunery.supervisor import LOG_ROTATED_OVER_BYTES, empty_log


def test_a_log_that_grew_large_is_emptied_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "job_svc.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"x" * LOG_ROTATED_OVER_BYTES)
        empty_log(path)
        assert path.stat().st_size == LOG_ROTATED_OVER_BYTES
        log.write(b"y\n")
        empty_log(path)
        log.write(b"z\n")
    assert path.read_bytes() == b"z\n"
    assert (tmp_path / "job_svc.log.1").read_bytes().endswith(b"xxy\n")


def test_a_log_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    empty_log(tmp_path / "none.log")
