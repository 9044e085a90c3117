"""A stack that the tests here share. Each makes an account of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.stack import ChaosStack, chaos_stack


@pytest.fixture(scope="session")
def chaos() -> Iterator[ChaosStack]:
    with chaos_stack("sqlite") as stack:
        yield stack
