"""Notices that the embedded S3 server goes on refusing writes after its disk was full.

SeaweedFS keeps its index in eight LevelDBs, and LevelDB never writes to a journal again once that failed.
So every write into some folders is refused until the server is started again, however much room there is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

LOOK_SECONDS = 2.0
# After a restart, before the next look at the server: if the first didn't help, another won't so soon.
PAUSE_SECONDS = 60.0
_REFUSAL = re.compile(rb"/filerldb2/\S+: no space left on device")
_ROOM_BYTES = 64 * 2**20


class StoreWatch:
    """Looks at what the server says from now on, and at its disk."""

    def __init__(self, log: Path, folder: Path) -> None:
        """Args:
        log: of the server; may not be there yet.
        folder: of its data.
        """
        self._log = log
        self._folder = folder
        self._read_up_to = _size(log)
        self._had_room = False

    def is_stuck(self) -> bool:
        """Whether since the last look the server found its disk full, which had room then and has it now.

        To be asked every `LOOK_SECONDS`; blocking.
        """
        said, had_room = self._said(), self._had_room
        self._had_room = _has_room(self._folder)
        return had_room and self._had_room and _REFUSAL.search(said) is not None

    def _said(self) -> bytes:
        size = _size(self._log)
        # What has grown large is moved aside, and the log begins anew.
        start, self._read_up_to = (self._read_up_to if self._read_up_to <= size else 0), size
        try:
            with self._log.open("rb") as log:
                log.seek(start)
                return log.read(size - start)
        except OSError:
            return b""


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:  # not there yet
        return 0


def _has_room(folder: Path) -> bool:
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    has_names = found.f_favail > 0 or found.f_files == 0  # some file systems don't count them
    return has_names and found.f_bavail * found.f_frsize >= _ROOM_BYTES
