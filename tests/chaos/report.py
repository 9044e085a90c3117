"""Keeps what came of the runs: bench/results/chaos.json, and from it the tables in docs/reliability.md."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.cells import Cell, is_sensible
from tests.chaos.faults import FAULTS
from tests.chaos.stack import KINDS
from tests.chaos.workload import MOMENTS

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "chaos.json"
PAGE = ROOT / "docs" / "reliability.md"
_MARKED = re.compile(r"(<!-- results: make chaos -->\n).*?(<!-- end of results -->)", re.DOTALL)


class Report:
    """The results so far. A cell or schedule that is run again takes the former one's place."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {"cells": [], "schedules": []}

    def add_cell(self, cell: Cell) -> None:
        """Keeps what came of a cell."""
        self._put("cells", ("stack", "fault", "moment"), asdict(cell))

    def add_schedule(self, stack: str, seed: int, problems: list[str]) -> None:
        """Keeps what came of a schedule."""
        self._put("schedules", ("stack", "seed"), {"stack": stack, "seed": seed, "problems": problems})

    def _put(self, kind: str, key: tuple[str, ...], result: dict[str, Any]) -> None:
        if RESULT.exists():  # read anew each time: another run may have written meanwhile
            self._results |= json.loads(RESULT.read_text(encoding="utf-8"))
        kept = [old for old in self._results[kind] if any(old[name] != result[name] for name in key)]
        self._results[kind] = [*kept, result]
        self._write()

    def _write(self) -> None:
        self._results |= {
            "command": " ".join(["python -m tests.chaos", *sys.argv[1:]]),
            "commit": _commit(),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        RESULT.write_text(json.dumps(self._results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        assert _MARKED.search(page), f"{PAGE} has no place for the results"
        PAGE.write_text(_MARKED.sub(lambda m: m[1] + self._tables() + m[2], page), encoding="utf-8")

    def _tables(self) -> str:
        cells = {(cell["fault"], cell["moment"]): cell for cell in self._results["cells"]}
        lines = ["| Fault | " + " | ".join(MOMENTS) + " |", "|---|" + "---|" * len(MOMENTS)]
        for fault in FAULTS:
            if any(is_sensible(fault, moment) for moment in MOMENTS):
                marks = [_mark(fault, moment, cells.get((fault, moment))) for moment in MOMENTS]
                lines.append(f"| {fault} | " + " | ".join(marks) + " |")
        passed = sum(not cell["problems"] for cell in cells.values())
        lines += ["", f"{passed} of {len(cells)} cells pass."]
        for stack in KINDS:
            drawn = [each for each in self._results["schedules"] if each["stack"] == stack]
            if drawn:
                failed = sorted(each["seed"] for each in drawn if each["problems"])
                told = f"{len(drawn) - len(failed)} of {len(drawn)} random schedules pass on {stack}"
                lines.append(f"{told}; those that fail: {failed}." if failed else f"{told}.")
        return "\n".join(lines) + "\n"


def _commit() -> str:
    """The commit that runs, and whether more than the results differs from it."""
    results = [f":!{path.relative_to(ROOT)}" for path in (RESULT, PAGE)]
    name = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    is_clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", *results], cwd=ROOT, check=False)
    return name if is_clean.returncode == 0 else f"{name}-dirty"


def _mark(fault: str, moment: str, cell: dict[str, Any] | None) -> str:
    if cell is None:
        return " " if is_sensible(fault, moment) else "–"
    return "✗" if cell["problems"] else "✓"
