"""A pickle does whatever its maker wants when it is read: none is read, wherever weights are looked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_svc.model_host import _load_adapter, _load_base
from svc_kit.catalog import load_catalog
from trainer_svc.base_models import pull
from trainer_svc.engine.base_model import load_base_model
from trainer_svc.engine.errors import JobFault

CPU = torch.device("cpu")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "exploded"


@pytest.fixture
def base_model(tmp_path: Path, marker: Path) -> Path:
    """A folder of a base model whose weights are a pickle."""
    folder = pull(load_catalog().get("tunery-tiny"), tmp_path / "models")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    return folder


def test_the_bomb_is_one(marker: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(marker)))  # noqa: S301  # our own

    assert marker.exists()


def test_base_models(base_model: Path, marker: Path) -> None:
    with pytest.raises(OSError, match="safetensors"):
        _load_base(base_model, CPU)
    with pytest.raises(JobFault, match="safetensors"):
        load_base_model(base_model, torch.float32, CPU)

    assert not marker.exists()


def test_adapters(tmp_path: Path, marker: Path, models_dir: Path) -> None:
    base = _load_base(pull(load_catalog().get("tunery-tiny"), models_dir), CPU)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))

    with pytest.raises(FileNotFoundError, match="safetensors"):
        _load_adapter(base, "x", folder)

    assert not marker.exists()
