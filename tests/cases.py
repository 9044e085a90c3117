"""How many cases tests make up: as many as there is time for in `make test`, and many more at night."""

from __future__ import annotations

import os


def num_cases(usual: int) -> int:
    """Returns `usual`, or TUNERY_TEST_CASES where that is set."""
    return int(os.environ.get("TUNERY_TEST_CASES", usual))
