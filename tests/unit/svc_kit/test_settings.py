"""What a process says of its environment when it can't start with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MODULES = ("dataset_svc", "job_svc", "trainer_svc", "inference_svc", "gateway.authz", "gateway")
SECRET = "a-secret"


def told(module: str, **variables: str) -> list[str]:
    """Runs a process that can't start, and returns the lines that it says."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    result = subprocess.run(
        [sys.executable, "-m", module],
        env={**own, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert not result.stdout
    return result.stderr.splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_each_missing_variable_is_named_on_a_line_without_the_others_values(module: str) -> None:
    lines = told(module, TUNERY_S3_SECRET_KEY=SECRET, TUNERY_DATABASE_URL=SECRET)
    assert len(lines) > 1
    for line in lines:
        assert line.startswith("TUNERY_")
        assert line.endswith(": Field required")
    assert SECRET not in "".join(lines)


def test_a_wrong_value_is_told_of() -> None:
    lines = told("dataset_svc", TUNERY_MAX_UPLOAD_BYTES="much")
    assert any("TUNERY_MAX_UPLOAD_BYTES: Input should be a valid integer" in line for line in lines)
    lines = told("inference_svc", TUNERY_LOG_LEVEL="LOUD")
    assert any(line.startswith("TUNERY_LOG_LEVEL: ") and "DEBUG" in line for line in lines)
    lines = told("gateway", TUNERY_GATEWAY_LISTEN="localhost:80")
    assert any("TUNERY_GATEWAY_LISTEN: 'localhost:80': the host must be an IP" in line for line in lines)


def test_a_list_that_is_no_json_is_told_of() -> None:
    [line] = told("dataset_svc", TUNERY_IMPORT_FILE_ROOTS="/srv")
    assert "import_file_roots" in line
    assert "take JSON" in line
