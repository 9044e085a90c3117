"""Text of others, made harmless for a terminal."""

from __future__ import annotations

import re

# All that moves a cursor, changes a colour or rings; lines and tabs stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Returns a text with control characters written out, as in `\\x1b`; files and names can have them."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
