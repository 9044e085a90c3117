"""State in 8 bits and weights in 4, by bitsandbytes' kernels for the CPU, or for a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.unit.engine.conftest import DEVICE
from trainer_svc.engine import base_model
from trainer_svc.engine.base_model import BaseModel, load_base_model
from trainer_svc.engine.checkpoint import STATE_DIR
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import Extras, RunSpec
from trainer_svc.engine.setup import prepare

MakeSpec = Callable[..., RunSpec]
EIGHT_BITS = {"dtype": "float32", "optimizer": "adamw_8bit"}
FULL = {"kind": "full", "activation_checkpointing": False}


@pytest.fixture
def _quantizes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right there, if slow."""
    monkeypatch.setattr(base_model, "_QUANTIZED_ON", {DEVICE.type})


def test_state_in_8_bits_trains_as_well(make_spec: MakeSpec, run_engine: Any) -> None:
    changes = {"method": FULL, "learning_rate": 1e-3}
    usual = run_engine(make_spec("usual", **changes))
    thrifty = run_engine(make_spec("thrifty", extras=EIGHT_BITS, **changes))
    assert thrifty.losses != usual.losses
    assert thrifty.losses == pytest.approx(usual.losses, rel=0.05)
    assert thrifty.of_kind("finished")

    def state_bytes(run: Any) -> int:
        path = run.output_dir / "checkpoints" / "epoch-2" / STATE_DIR / "optimizer.safetensors"
        return sum(tensor.nbytes for tensor in load_file(path).values())

    assert state_bytes(thrifty) < 0.35 * state_bytes(usual)


def test_a_resumed_run_with_state_in_8_bits_is_the_undisturbed_one(
    make_spec: MakeSpec, run_engine: Any
) -> None:
    extras = EIGHT_BITS | {"checkpoint_every_steps": 3, "keep_checkpoints": 9}
    whole = run_engine(make_spec("whole", method=FULL, extras=extras))
    start = whole.output_dir / "checkpoints" / "step-3"
    resumed = run_engine(make_spec("resumed", method=FULL, extras=extras, resume_from=start))
    assert resumed.losses == whole.losses[3:]


def test_state_in_8_bits_cant_be_sharded(make_spec: MakeSpec) -> None:
    with pytest.raises(JobFault, match="sharded over processes: take adamw, one process, or LoRA"):
        prepare(make_spec(method=FULL, extras=EIGHT_BITS), ProcessGroup(0, 2, DEVICE), None)  # type: ignore[arg-type]  # not reached


@pytest.mark.usefixtures("_quantizes_on_the_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn_on_weights_in_4_bits(
    dtype: str, make_spec: MakeSpec, run_engine: Any, tiny: BaseModel
) -> None:
    extras = {"dtype": dtype}
    usual = run_engine(make_spec("usual", extras=extras))
    quantized = run_engine(make_spec("quantized", extras=extras | {"quantize_base": "nf4"}))
    assert quantized.losses != usual.losses
    assert quantized.losses == pytest.approx(usual.losses, rel=0.2)
    assert quantized.losses[-1] < 0.95 * quantized.losses[0]
    # Read back, on a base in 4 bits too, it was found to be what was trained.
    assert quantized.of_kind("finished")
    # And it is an adapter like any other.
    adapted = PeftModel.from_pretrained(tiny.model, str(quantized.output_dir / "artifact"))
    assert adapted.active_adapters == ["default"]


@pytest.mark.usefixtures("_quantizes_on_the_cpu")
def test_dora_on_weights_in_4_bits(make_spec: MakeSpec, run_engine: Any) -> None:
    done = run_engine(
        make_spec(extras={"dtype": "float32", "quantize_base": "nf4", "lora_variant": "dora"}, max_steps=2)
    )
    assert done.of_kind("finished")


@pytest.mark.usefixtures("_quantizes_on_the_cpu")
def test_weights_in_4_bits_are_counted_one_by_one(make_spec: MakeSpec, run_engine: Any) -> None:
    def said(name: str, quantize_base: str) -> int:
        done = run_engine(make_spec(name, extras={"quantize_base": quantize_base}, max_steps=1))
        [parameters] = [event["parameters"] for event in done.of_kind("log") if "parameters" in event]
        assert isinstance(parameters, int)
        return parameters

    assert said("quantized", "nf4") == said("whole", "none")


@pytest.mark.usefixtures("_quantizes_on_the_cpu")
def test_a_resumed_run_on_weights_in_4_bits_is_the_undisturbed_one(
    make_spec: MakeSpec, run_engine: Any
) -> None:
    extras = {"dtype": "float32", "quantize_base": "nf4", "checkpoint_every_steps": 3, "keep_checkpoints": 9}
    whole = run_engine(make_spec("whole", extras=extras))
    start = whole.output_dir / "checkpoints" / "step-3"
    resumed = run_engine(make_spec("resumed", extras=extras, resume_from=start))
    assert resumed.losses == whole.losses[3:]


@pytest.mark.usefixtures("_quantizes_on_the_cpu")
def test_weights_in_4_bits_take_a_quarter(tiny: BaseModel, make_spec: MakeSpec) -> None:
    spec = make_spec()
    quantized = load_base_model(spec.base_model_dir, torch.bfloat16, DEVICE, Extras(quantize_base="nf4"))
    for name, module in quantized.model.named_modules():
        if name.endswith("_proj"):
            whole = tiny.model.get_submodule(name).weight
            assert isinstance(whole, torch.Tensor)
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            assert weight.nbytes == whole.numel() // 2
            assert not weight.requires_grad
