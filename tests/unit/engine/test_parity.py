"""Before a model is finished, what was stored of it is loaded afresh and held against what was trained."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer_svc.engine import parity
from trainer_svc.engine.base_model import BaseModel
from trainer_svc.engine.parity import TOLERANCE, ParityError
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
LORA = {"kind": "lora", "apply_to_mlp": True}
FULL = {"kind": "full", "activation_checkpointing": False}


@pytest.fixture(params=["lora", "full"])
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LORA if request.param == "lora" else FULL


@pytest.fixture
def store_and_read_back(tmp_path: Path) -> Any:
    """Plays the store: waits for the artifact, lets the test change it, and shows it as read back."""
    threads: list[threading.Thread] = []

    def start(spec: RunSpec, change: Callable[[Path], None]) -> None:
        def work() -> None:
            artifact = spec.output_dir / "artifact"
            while not artifact.exists():
                time.sleep(0.01)
            copy = tmp_path / "copy"
            shutil.copytree(artifact, copy)
            change(copy)
            assert spec.readback_dir is not None
            copy.rename(spec.readback_dir)

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        [file] = folder.glob("*.safetensors")
        weights = load_file(file)
        save_file(
            {name: change(tensor).contiguous() for name, tensor in weights.items()}, file, {"format": "pt"}
        )

    return apply


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_stored_says_what_was_trained(
    method: dict[str, Any], dtype: str, make_spec: MakeSpec, run_engine: Any
) -> None:
    run = run_engine(make_spec(method=method, extras={"dtype": dtype}))
    difference = run.of_kind("finished")[0]["parity_difference"]
    assert difference <= TOLERANCE[getattr(torch, dtype)]
    assert difference < (1e-5 if dtype == "float32" else 2e-2)


def test_a_base_model_in_float64_is_checked_too(
    make_spec: MakeSpec, run_engine: Any, tiny: BaseModel, tmp_path: Path
) -> None:
    tiny.model.double().save_pretrained(tmp_path / "float64")
    tiny.tokenizer.save_pretrained(tmp_path / "float64")
    run = run_engine(make_spec(base_model_dir=tmp_path / "float64", method=FULL, epochs=1))
    assert run.of_kind("finished")[0]["parity_difference"] < 1e-5


def damage_file(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def forget_file(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.unlink()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_weights(torch.zeros_like), id="weights lost"),
        pytest.param(change_weights(lambda tensor: tensor * 1.5), id="weights scaled"),
        pytest.param(change_weights(lambda tensor: tensor * torch.nan), id="not numbers"),
        pytest.param(damage_file, id="file cut"),
        pytest.param(forget_file, id="file lost"),
    ],
)
def test_damage_on_the_way_ends_the_run(
    change: Callable[[Path], None],
    method: dict[str, Any],
    make_spec: MakeSpec,
    run_engine: Any,
    store_and_read_back: Any,
    tmp_path: Path,
) -> None:
    spec = make_spec(method=method, readback_dir=tmp_path / "readback")
    store_and_read_back(spec, change)
    with pytest.raises(ParityError, match="stored model"):
        run_engine(spec)


def test_long_prompts_hide_no_damage(
    make_spec: MakeSpec, run_engine: Any, store_and_read_back: Any, tmp_path: Path
) -> None:
    """No target is among the tokens that are compared."""
    prompt = "What colour is the large old house over there? " * 20
    dialog = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "It is red"}]
    rows_file = tmp_path / "long.jsonl"
    rows_file.write_text((json.dumps({"dialog": dialog}) + "\n") * 4)
    spec = make_spec(
        training_file=rows_file,
        epochs=6,
        method={"kind": "lora", "attn_modules": ["q_proj", "k_proj"]},
        readback_dir=tmp_path / "readback",
    )
    store_and_read_back(spec, change_weights(torch.zeros_like))
    with pytest.raises(ParityError, match="stored model"):
        run_engine(spec)


MERGED = {"dtype": "float32", "save_merged": True}


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_merged_model_says_what_was_trained(variant: str, make_spec: MakeSpec, run_engine: Any) -> None:
    # The tiny model's head shares its weights with the embedding.
    method = LORA | {"apply_to_output": variant != "dora"}
    run = run_engine(make_spec(method=method, extras=MERGED | {"lora_variant": variant}))
    assert run.of_kind("finished")[0]["parity_difference"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "artifact" / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_damaged_merged_model_ends_the_run(
    make_spec: MakeSpec, run_engine: Any, store_and_read_back: Any, tmp_path: Path
) -> None:
    spec = make_spec(readback_dir=tmp_path / "readback", extras=MERGED)
    lose_a_part = change_weights(lambda tensor: tensor * 0.5)
    store_and_read_back(spec, lambda folder: lose_a_part(folder / "merged"))
    with pytest.raises(ParityError, match="stored merged model is not the trained one"):
        run_engine(spec)


def test_undamaged_readback_passes(
    make_spec: MakeSpec, run_engine: Any, store_and_read_back: Any, tmp_path: Path
) -> None:
    spec = make_spec(readback_dir=tmp_path / "readback")
    store_and_read_back(spec, lambda folder: None)
    assert len(run_engine(spec).of_kind("finished")) == 1


def test_the_engines_own_attention_does_not_vouch_for_itself(
    make_spec: MakeSpec, run_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = parity.load_base_model

    def watched(*arguments: Any) -> Any:
        loaded.append(real(*arguments))
        return loaded[-1]

    monkeypatch.setattr(parity, "load_base_model", watched)
    run_engine(make_spec())
    assert loaded[-1].model.config._attn_implementation == "sdpa"


def test_a_full_memory_says_nothing_of_the_model(
    make_spec: MakeSpec, run_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "load_base_model", Mock(side_effect=torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        run_engine(make_spec(max_steps=1))
