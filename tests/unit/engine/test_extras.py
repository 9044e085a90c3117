"""Every further setting changes what it says it changes, or is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.unit.engine.conftest import DEVICE, read_run
from tests.unit.engine.ranks import run_ranks
from trainer_svc.engine import base_model
from trainer_svc.engine.base_model import BaseModel
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.examples import load_examples, tokenize_row
from trainer_svc.engine.rows import TextRow
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
FULL = {"kind": "full", "activation_checkpointing": False}


@pytest.fixture
def run(make_spec: MakeSpec, run_engine: Any) -> Callable[..., Any]:
    """Runs with some extras; further keywords go into the specification."""

    def run(name: str, extras: dict[str, Any], **changes: Any) -> Any:
        return run_engine(make_spec(name, extras={"dtype": "float32"} | extras, **changes))

    return run


@pytest.mark.parametrize(
    "extras",
    [
        {"weight_decay": 1.0},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 1e-2},
        {"warmup_steps": 3},
        {"lr_scheduler": "linear"},
        {"max_grad_norm": 1e-4, "adam_epsilon": 1e-3},
        {"max_sequence_length": 60},
        {"lora_dropout": 0.5},
        {"lora_variant": "rslora"},
        {"lora_variant": "dora"},
    ],
    ids=lambda extras: "-".join(extras),
)
def test_setting_changes_the_training(extras: dict[str, Any], run: Any) -> None:
    assert run("with", extras, max_steps=6).losses != run("without", {}, max_steps=6).losses


@pytest.mark.parametrize(
    "extras",
    [{"packing": False}, {"attention": "sdpa"}, {"attention": "eager"}, {"report_every_steps": 1}],
    ids=lambda extras: "-".join(f"{name}-{value}" for name, value in extras.items()),
)
def test_setting_changes_no_number(extras: dict[str, Any], run: Any) -> None:
    assert run("with", extras).losses == pytest.approx(run("without", {}).losses, rel=1e-4)


def test_rows_are_packed_only_where_asked(run: Any) -> None:
    def said(extras: dict[str, Any], name: str) -> str:
        return "\n".join(event["message"] for event in run(name, extras, max_steps=1).of_kind("log"))

    assert "rows packed" in said({}, "auto")
    assert "rows packed" in said({"packing": True}, "on")
    assert "rows one by one" in said({"packing": False}, "off")
    assert "rows one by one" in said({"attention": "eager"}, "eager")


@pytest.mark.parametrize(("variant", "flag"), [("rslora", "use_rslora"), ("dora", "use_dora")])
def test_variants_are_pefts_own(variant: str, flag: str, run: Any) -> None:
    artifact = run("out", {"lora_variant": variant}, max_steps=2).output_dir / "artifact"
    assert json.loads((artifact / "adapter_config.json").read_text())[flag] is True
    weights = load_file(artifact / "adapter_model.safetensors")
    assert any("magnitude" in name for name in weights) is (variant == "dora")


def test_long_rows_are_split(tiny: BaseModel, tmp_path: Path) -> None:
    text = "A sentence of words. " * 20
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "Short."}) + "\n")
    whole = tokenize_row(TextRow(text=text), tiny.tokenizer)

    split = load_examples(path, tiny.tokenizer, 16, "split")
    *parts, short = split.examples
    assert split.num_split == 1
    # A last part of one token has nothing before it to be predicted from.
    learnt = whole.input_ids[: whole.num_tokens - (whole.num_tokens % 16 == 1)].tolist()
    assert [token for part in parts for token in part.input_ids.tolist()] == learnt
    assert all(part.num_tokens <= 16 and not part.is_target[0] for part in parts)
    assert [part.line_number for part in parts] == [1] * len(parts)
    assert short.line_number == 2


def test_rows_longer_than_the_context_are_refused(run: Any) -> None:
    with pytest.raises(JobFault, match="max_sequence_length is 2,049, but tunery-tiny reads at most 2,048"):
        run("out", {"max_sequence_length": 2049})


def test_measures_and_checkpoints_between_the_epochs(run: Any, rows_file: Path) -> None:
    extras = {"eval_every_steps": 3, "checkpoint_every_steps": 2}
    events = run("out", extras, validation_file=rows_file)
    assert [event["step"] for event in events.of_kind("validation")] == [3, 4, 6, 8]
    assert [event["step"] for event in events.of_kind("checkpoint")] == [2, 4, 6, 8]
    assert [event["ends_epoch"] for event in events.of_kind("checkpoint")] == [False, True, False, True]


def test_training_stops_when_the_validation_loss_gains_no_more(run: Any, rows_file: Path) -> None:
    extras = {"eval_every_steps": 1, "early_stopping_patience": 2, "early_stopping_min_gain": 100.0}
    stopped = run("out", extras, validation_file=rows_file)
    # The first measurement is a gain, the next two are none.
    assert [event["step"] for event in stopped.of_kind("step")] == [1, 2, 3]
    assert stopped.of_kind("checkpoint")[-1]["step"] == 3
    assert any("stopped early after step 3" in event["message"] for event in stopped.of_kind("log"))
    assert stopped.of_kind("finished")[0]["steps"] == 3

    patient = run("patient", extras | {"early_stopping_min_gain": 0.0}, validation_file=rows_file)
    assert len(patient.losses) == 8


def test_every_nth_step_tells_of_the_device(run: Any) -> None:
    events = run("out", {"report_every_steps": 3}).of_kind("step")
    assert [event["step"] for event in events if "peak_memory_bytes" in event] == [3, 6, 8]
    for event in (events[2], events[5]):
        assert event["peak_memory_bytes"] > 50 * 2**20
        assert event["padding_share"] == 0
        assert 0 < event["matrix_peak_share"] < 1
    assert all(event["estimated_finish"].endswith("Z") for event in events)


@pytest.mark.parametrize(
    ("extras", "layers"), [({}, "hand-written layers"), ({"attention": "sdpa"}, "transformers' layers")]
)
def test_torch_compile_changes_no_number(
    extras: dict[str, Any], layers: str, run: Any, make_spec: MakeSpec, tiny_dir: Path, tmp_path: Path
) -> None:
    one_layer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_dir, num_hidden_layers=1))
    one_layer.save_pretrained(tmp_path / "one-layer")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "one-layer")
    changes = {"base_model_dir": tmp_path / "one-layer", "max_steps": 1}
    spec = make_spec("with", extras={"dtype": "float32", "compile": True} | extras, **changes)
    # In a process of its own: torch warns of its own deprecated calls when it compiles.
    assert run_ranks(spec, 1)
    compiled = read_run(spec.output_dir)
    assert compiled.losses == pytest.approx(run("without", {}, **changes).losses, rel=1e-4)
    assert any(f"{layers} by torch.compile" in event["message"] for event in compiled.of_kind("log"))


def test_torch_compile_is_refused_without_a_compiler(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        JobFault, match=r"compile needs the C\+\+ compiler no-such-compiler, .*: leave it out"
    ):
        run("out", {"compile": True})


def test_dora_on_a_row_of_zeros_is_refused(run: Any) -> None:
    """The tiny model has never seen its token for padding, and shares its embedding with the output head."""
    method = {"kind": "lora", "apply_to_output": True}
    with pytest.raises(JobFault, match="each row of lm_head, and 1 of them are zero"):
        run("out", {"lora_variant": "dora"}, method=method)


@pytest.mark.parametrize(
    ("extras", "word"),
    [({"quantize_base": "nf4"}, "quantize_base nf4"), ({"optimizer": "adamw_8bit"}, "optimizer adamw_8bit")],
)
def test_what_needs_bitsandbytes_is_refused_without_it(
    extras: dict[str, Any], word: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "_QUANTIZED_ON", {DEVICE.type})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(JobFault, match=f"{word} needs bitsandbytes, which isn't installed"):
        run("out", extras)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_four_bits_are_refused_without_a_gpu(run: Any) -> None:
    with pytest.raises(JobFault, match="quantize_base nf4 needs a GPU"):
        run("out", {"quantize_base": "nf4"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extras": {"lora_dropout": 0.1}, "method": FULL}, "lora_dropout goes with LoRA only"),
        ({"extras": {"lora_variant": "dora"}, "method": FULL}, "lora_variant goes with LoRA only"),
        ({"extras": {"save_merged": True}, "method": FULL}, "save_merged goes with LoRA only"),
        ({"extras": {"save_merged": True, "quantize_base": "nf4"}}, "leave quantize_base out"),
        ({"extras": {"quantize_base": "nf4"}, "method": FULL}, "quantize_base goes with LoRA only"),
        ({"extras": {"eval_every_steps": 2}}, "eval_every_steps needs validation rows"),
        ({"extras": {"early_stopping_patience": 2}}, "early_stopping_patience needs validation rows"),
        ({"extras": {"early_stopping_min_gain": 0.1}}, "needs early_stopping_patience"),
        ({"extras": {"packing": True, "attention": "eager"}}, "packing needs attention auto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_have_no_effect_is_refused(
    changes: dict[str, Any], words: str, make_spec: MakeSpec
) -> None:
    with pytest.raises(ValidationError, match=words):
        make_spec(**changes)
