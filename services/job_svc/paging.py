"""Which part of a list is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from svc_kit.errors import InvalidRequest

_LARGEST_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Page:
    """A part of a list.

    Attributes:
        limit: at most so many.
        offset: after so many that are left out.
    """

    limit: int
    offset: int

    @classmethod
    def of(cls, limit: int | None, offset: int | None, *, default: int, most: int) -> Page:
        """Returns the page that a request names.

        Args:
            limit: None is `default`.
            offset: None is 0.
            default: the limit where none is named.
            most: the largest limit.

        Raises:
            InvalidRequest: `limit` is not 1 to `most`, or `offset` is negative.
        """
        page = cls(default if limit is None else limit, offset or 0)
        if not 1 <= page.limit <= most:
            raise InvalidRequest(
                f"`limit` must be from 1 to {most:,}, but it is {page.limit}.", field="limit"
            )
        if not 0 <= page.offset <= _LARGEST_OFFSET:
            raise InvalidRequest(f"`offset` must be 0 or more, but it is {page.offset}.", field="offset")
        return page
