"""The Makefile's promises that the other tests don't show by running at all."""

from __future__ import annotations

import ensurepip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
BUNDLED_PIP = Path(ensurepip.__file__).with_name("_bundled")


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def test_help_lists_every_target_that_is_for_people() -> None:
    listed = set(re.findall(r"^  make (\w+) ", make("-C", str(ROOT), "help").stdout, re.MULTILINE))
    assert listed >= {"help", "setup", "demo", "test", "check", "protos", "bench"}
    [phony] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert listed == set(phony.split()) - {"breaking"}


@pytest.mark.skipif(not BUNDLED_PIP.is_dir(), reason="this Python brings no pip that is installed offline")
def test_the_environment_is_made_where_debian_has_no_ensurepip(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # What Debian's python3 does without the package python3-venv.
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *ensurepip* | "-m venv .venv") exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(BUNDLED_PIP), "PIP_CONFIG_FILE": os.devnull}

    made = make("-C", str(tmp_path), ".venv/made", f"PYTHON={python}", **offline)

    assert made.returncode == 0, made.stderr
    pip = subprocess.run(
        [tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in pip.stdout


def test_setup_asks_for_models_that_were_removed_since() -> None:
    commands = make("-C", str(ROOT), "--dry-run", "--old-file=.venv/installed", "setup").stdout
    assert re.findall(r"models pull (\S+)", commands) == ["smollm2-135m-instruct", "tunery-tiny"]
