"""Values that several tests send and look for."""

from __future__ import annotations

SUFFIX_OF_64 = "A" + "b.c-d_7" * 9
METADATA = {
    "team": "café ☕ \U0001f680",
    "nested": {"list": [1, 2.5, -3, "x", None, True, {"deep": []}], "empty": {}},
    "numbers": [0, -1, 1.5, 1e-9, 1e300, 2**53],
    "": "an empty key",
    'quote"\\\n': "an odd one",
}
