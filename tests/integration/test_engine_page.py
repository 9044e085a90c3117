"""docs/engine.md keeps its word: its very lines fine-tune a model without the service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svc_kit.catalog import load_catalog
from trainer_svc.base_models import pull
from trainer_svc.engine.events import Kind
from trainer_svc.engine.parity import TOLERANCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
[PROGRAM] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MAX_LINES = 20


def test_the_program_is_short() -> None:
    assert len([line for line in PROGRAM.splitlines() if line]) <= MAX_LINES


def test_the_program_fine_tunes_and_answers(tmp_path: Path, models_dir: Path) -> None:
    base = pull(load_catalog().get("tunery-tiny"), models_dir)
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"BASE": str(base), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    assert any(line.startswith("step 8/8 ") for line in printed)
    assert any("stored model checked" in line for line in printed)
    assert re.fullmatch(r"torch\.Size\(\[1, \d+\]\)", printed[-1])
    assert (tmp_path / "run" / "checkpoints" / "epoch-4").is_dir()


def test_every_kind_of_event_is_described() -> None:
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE)))
    assert set(Kind.__args__) <= set(described)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerances_are_those_stated(dtype: torch.dtype) -> None:
    shown = f"{TOLERANCE[dtype]:.0e}".replace("e-0", "e-")
    assert f"{shown} in {str(dtype).removeprefix('torch.')}" in PAGE
