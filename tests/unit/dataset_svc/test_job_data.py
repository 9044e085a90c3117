"""Which rows are drawn for validation."""

from __future__ import annotations

import random

import pytest

from dataset_svc.job_data import _select


@pytest.mark.parametrize(("num_drawn", "num_rows"), [(1, 2), (3, 10), (99, 100), (500, 1000)])
def test_exactly_as_many_as_asked_for_are_drawn(num_drawn: int, num_rows: int) -> None:
    for seed in range(20):
        drawn = list(_select(random.Random(seed), num_drawn, num_rows))
        assert (len(drawn), sum(drawn)) == (num_rows, num_drawn)
        assert drawn == list(_select(random.Random(seed), num_drawn, num_rows))


def test_every_row_is_as_likely_as_another() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for index, is_drawn in enumerate(_select(random.Random(seed), 3, 10)):
            counts[index] += is_drawn
    assert all(500 < count < 700 for count in counts)
