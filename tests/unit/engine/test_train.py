"""Whole runs on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
FLOAT32 = {"dtype": "float32"}
FULL = {"kind": "full", "activation_checkpointing": False}
METHODS = [pytest.param({"kind": "lora"}, id="lora"), pytest.param(FULL, id="full")]


def test_events_of_a_run(make_spec: MakeSpec, run_engine: Any, rows_file: Path) -> None:
    run = run_engine(make_spec(validation_file=rows_file, train_log_file="train.log"))
    kinds = [event["kind"] for event in run.events if event["kind"] not in ("log", "checkpoint")]
    assert kinds == [
        *["step"] * 4, "validation", *["step"] * 4, "validation", "artifact", "finished"
    ]  # fmt: skip
    # Checkpoints are written while training goes on, so others may come between.
    assert [event["path"] for event in run.of_kind("checkpoint")] == [
        "checkpoints/epoch-1",
        "checkpoints/epoch-2",
    ]
    last = run.of_kind("step")[-1]
    assert (last["step"], last["total_steps"], last["epoch"]) == (8, 8, 2)
    finished = run.of_kind("finished")[0]
    assert finished["training_loss"] == last["loss"]
    assert finished["validation_loss"] == run.of_kind("validation")[-1]["loss"]
    assert (finished["steps"], finished["epochs_completed"]) == (8, 2)
    tokens = next(event["tokens"] for event in run.events if "tokens" in event)
    assert finished["tokens_trained"] == 2 * tokens
    assert run.losses[-1] < run.losses[0] - 0.5
    log_lines = (run.output_dir / "artifact" / "train.log").read_text().splitlines()
    assert len(log_lines) == len(run.events) - 2  # the artifact's own event and the end come after it


def test_full_validation_loss_is_the_untouched_models_at_first(
    make_spec: MakeSpec, run_engine: Any, rows_file: Path
) -> None:
    """A learning rate too small to matter: validation and the mean training loss are the base model's."""
    run = run_engine(make_spec(validation_file=rows_file, learning_rate=1e-12, batch_size=13, epochs=1))
    assert run.of_kind("validation")[0]["loss"] == pytest.approx(run.losses[0], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_losses(method: dict[str, Any], make_spec: MakeSpec, run_engine: Any) -> None:
    first, again, other = (
        run_engine(make_spec(name, method=method, seed=seed)).losses
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert first == again
    assert first != other


def test_accumulation_is_one_large_batch(make_spec: MakeSpec, run_engine: Any) -> None:
    large = run_engine(make_spec("large", batch_size=8)).losses
    accumulated = run_engine(make_spec("accumulated", batch_size=2, gradient_accumulation_steps=4)).losses
    assert accumulated == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("method", METHODS[1:])
def test_activation_checkpointing_changes_no_number(
    method: dict[str, Any], make_spec: MakeSpec, run_engine: Any
) -> None:
    plain = run_engine(make_spec("plain", method=method, max_steps=3)).losses
    on = run_engine(make_spec("on", method=method | {"activation_checkpointing": True}, max_steps=3))
    assert on.losses == pytest.approx(plain, rel=1e-6)
    messages = "\n".join(event["message"] for event in on.of_kind("log"))
    assert "activation checkpointing on" in messages
    assert "fsdp_cpu_offload: no effect" in messages


# peft's own: it asks by transformers' old name, and warns of merging an adapter of the tied output head.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("change", [{"apply_to_mlp": True, "apply_to_output": True}, {}])
def test_adapter_loads_in_plain_peft(
    change: dict[str, Any], make_spec: MakeSpec, run_engine: Any, tiny_dir: Path, rows_file: Path
) -> None:
    spec = make_spec(validation_file=rows_file, method={"kind": "lora"} | change)
    run = run_engine(spec)
    artifact = run.output_dir / "artifact"
    config = json.loads((artifact / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tunery-tiny"
    assert "base_model: tunery-tiny" in (artifact / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = PeftModel.from_pretrained(base, artifact).eval()
    assert_reaches(model, artifact, rows_file, run.of_kind("validation")[-1]["loss"])


def test_full_model_loads_in_plain_transformers(
    make_spec: MakeSpec, run_engine: Any, rows_file: Path
) -> None:
    run = run_engine(make_spec(validation_file=rows_file, method=FULL, learning_rate=1e-3))
    for folder in (run.output_dir / "artifact", run.output_dir / "checkpoints" / "epoch-2"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.config.use_cache
        assert_reaches(model, folder, rows_file, run.of_kind("validation")[-1]["loss"])


def assert_reaches(model: Any, folder: Path, rows_file: Path, expected: float) -> None:
    """The model, with nothing of the engine in it, has the validation loss that the run reported."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in rows_file.read_text().splitlines():
        messages = json.loads(line)["dialog"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(messages[1]["content"] + "<|im_end|>").input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert total / count == pytest.approx(expected, rel=1e-5)


def test_full_artifact_keeps_the_bases_number_format(
    make_spec: MakeSpec, run_engine: Any, tiny_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "bf16")
    run = run_engine(make_spec(base_model_dir=tmp_path / "bf16", method=FULL, max_steps=1))
    stored = load_file(run.output_dir / "artifact" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((run.output_dir / "artifact" / "config.json").read_text())["dtype"] == "bfloat16"
    kept = load_file(run.output_dir / "checkpoints" / "epoch-1" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_unknown_module(make_spec: MakeSpec, run_engine: Any) -> None:
    with pytest.raises(JobFault, match=r"no module 'wq' .*it has down_proj, gate_proj, k_proj, o_proj"):
        run_engine(make_spec(method={"kind": "lora", "attn_modules": ["wq"]}))


def test_two_processes_train_as_one(
    make_spec: MakeSpec, run_engine: Any, run_torchrun: Any, rows_file: Path
) -> None:
    one = run_engine(make_spec("one", batch_size=6, validation_file=rows_file))
    # 13 rows: in the last step of an epoch the second process has none.
    code, two = run_torchrun(make_spec("two", batch_size=3, validation_file=rows_file), 2)
    assert code == 0
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert two.of_kind("validation")[-1]["loss"] == pytest.approx(
        one.of_kind("validation")[-1]["loss"], rel=1e-4
    )
    assert len(two.of_kind("finished")) == 1


def engine_process(spec: RunSpec, tmp_path: Path) -> subprocess.Popen[bytes]:
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "trainer_svc.engine", str(tmp_path / "spec.json")]
    services = str(Path(__file__).parents[3] / "services")
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": services})


def test_job_fault_exits_with_3(make_spec: MakeSpec, tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text("{}\n")
    spec = make_spec(training_file=rows)
    assert engine_process(spec, tmp_path).wait(timeout=60) == 3
    failed = json.loads((spec.output_dir / "events.jsonl").read_text().splitlines()[-1])
    assert (failed["kind"], failed["fault"]) == ("failed", "job")
    assert failed["message"].startswith("bad.jsonl, line 1: text: Field required")


def wait_for_steps(spec: RunSpec) -> None:
    events = spec.output_dir / "events.jsonl"
    deadline = time.monotonic() + 90
    while not (events.exists() and '"step"' in events.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_stops_at_once(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(epochs=10_000)
    process = engine_process(spec, tmp_path)
    wait_for_steps(spec)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=2) == -signal.SIGTERM


def test_dies_with_its_parent(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The parent is killed, as by the kernel's out-of-memory killer: no run may outlive it."""
    spec = make_spec(epochs=10_000)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    launcher = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-m', 'trainer_svc.engine', sys.argv[1]]); "
        "print(child.pid, flush=True); child.wait()"
    )
    command = [sys.executable, "-c", launcher, str(tmp_path / "spec.json")]
    services = str(Path(__file__).parents[3] / "services")
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": services}, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        wait_for_steps(spec)
        parent.kill()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_wandb_offline(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spec = make_spec(wandb_project="tests", max_steps=2)
    assert engine_process(spec, tmp_path).wait(timeout=120) == 0
    [run_file] = (spec.output_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert run_file.stat().st_size > 0
