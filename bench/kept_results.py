"""Keeps what a benchmark measured, with where it comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """Returns the machine, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores, {platform.machine()}, {model}"


def keep(name: str, result: dict[str, Any], machine: str | None = None) -> dict[str, Any]:
    """Writes `results/NAME.json`: what was measured, the command, the commit and the hardware.

    What a profile showed is written into the file by hand, as its `conclusion`, and stays.

    Args:
        name: of the file.
        result: what was measured.
        machine: the hardware, in words; None: this machine.

    Returns:
        All that was written.
    """
    path = RESULTS / f"{name}.json"
    conclusion = json.loads(path.read_text()).get("conclusion") if path.exists() else None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    whole = result | ({"conclusion": conclusion} if conclusion else {})
    whole |= {
        "command": " ".join(["bench/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": described.stdout.strip(),
        "hardware": machine or hardware(),
    }
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return whole
