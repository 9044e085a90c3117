"""Measurements of base models: made once in a process of their own, kept for this device alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svc_kit.catalog import load_catalog
from trainer_svc import probes as probes_module
from trainer_svc.base_models import pull
from trainer_svc.probes import ProbeFailed, Probes

ENTRY = load_catalog().get("tunery-tiny")


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    pull(ENTRY, tmp_path)
    return tmp_path


async def test_measured_once_and_kept(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(models_dir)
    assert probes.all() == []
    assert probes.get(ENTRY, "lora", "float32") is None

    measured = await probes.measure(ENTRY, "lora", "float32")
    assert (measured.base_model, measured.method, measured.dtype) == ("tunery-tiny", "lora", "float32")
    assert measured.startup_seconds > measured.load_seconds > 0
    assert measured.seconds_per_token > 0
    assert 2**26 < measured.base_memory_bytes < measured.total_memory_bytes
    assert probes.get(ENTRY, "lora", "float32") == measured
    assert probes.get(ENTRY, "full", "float32") is None
    assert Probes(models_dir).all() == [measured]

    monkeypatch.setattr(probes_module, "device", lambda: "another device")
    assert Probes(models_dir).all() == []
    assert Probes(models_dir).get(ENTRY, "lora", "float32") is None


async def test_a_model_that_cannot_be_measured(models_dir: Path) -> None:
    (models_dir / ENTRY.folder_name / "config.json").write_text("{}")
    with pytest.raises(ProbeFailed, match=r"can't be measured: .*can't be loaded"):
        await Probes(models_dir).measure(ENTRY, "lora", "auto")


def test_a_damaged_measurement_counts_as_none(models_dir: Path) -> None:
    probes = Probes(models_dir)
    path = probes._path(ENTRY, "lora", "auto")
    path.parent.mkdir()
    for text in ("{", json.dumps({"startup_seconds": "soon"}), json.dumps({"unknown": 1})):
        path.write_text(text)
        assert probes.get(ENTRY, "lora", "auto") is None
