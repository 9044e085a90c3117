"""How much each account has under way, so that none takes what all share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class UnderWay:
    """Counts what is under way in this process, by account."""

    def __init__(self) -> None:
        self._by_account: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How much all accounts have."""
        return self._by_account.total()

    def of(self, account_id: str) -> int:
        """Returns how much one account has."""
        return self._by_account[account_id]

    @contextmanager
    def one_more(self, account_id: str) -> Iterator[None]:
        """Counts one more of an account's for the block's time."""
        self._by_account[account_id] += 1
        try:
            yield
        finally:
            self._by_account[account_id] -= 1
            self._by_account += Counter()  # forgets those at 0
