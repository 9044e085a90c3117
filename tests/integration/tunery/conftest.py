from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.tunery.running import ROWS, Result, Up, Ups, run_tunery
from tunery.ports import free_ports


@pytest.fixture
def tunery() -> Callable[..., Result]:
    return run_tunery


@pytest.fixture
def free_port() -> str:
    """A port that nobody listens on, another stack's parts included."""
    return str(free_ports(1)[0])


@pytest.fixture
def rows_csv(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


@pytest.fixture(scope="module")
def ups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ups]:
    ups = Ups(tmp_path_factory.mktemp("ups"))
    yield ups
    ups.stop_all()


@pytest.fixture(scope="module")
def stack(ups: Ups, tmp_path_factory: pytest.TempPathFactory) -> Up:
    """A stack that every test of a module shares."""
    return ups.start_ready(tmp_path_factory.mktemp("stack") / "data")
