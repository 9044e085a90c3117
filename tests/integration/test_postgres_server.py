"""The tests' own PostgreSQL server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg


def test_it_outlives_the_start_of_another_pytest(postgres_url: str, tmp_path: Path) -> None:
    other = tmp_path / "test_other.py"
    other.write_text("def test_other(tmp_path):\n    pass\n")
    options = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(other)]
    subprocess.run(command, check=True, capture_output=True)

    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CHECKPOINT")  # which opens files that were not open before
