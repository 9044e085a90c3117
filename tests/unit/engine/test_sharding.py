"""Full fine-tuning over two processes: what is sharded, what is whole when, and that the numbers stay."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.unit.engine.conftest import DEVICE, Run, needs_gpu, read_run
from tests.unit.engine.ranks import in_ranks, run_ranks
from trainer_svc.engine import sharding
from trainer_svc.engine.base_model import load_base_model
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.examples import load_examples
from trainer_svc.engine.gradients import GradientComputer
from trainer_svc.engine.layers.speed_up import speed_up
from trainer_svc.engine.loss import summed_loss
from trainer_svc.engine.optimizer import make_optimizer
from trainer_svc.engine.packing import make_pack
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import FullMethod, RunSpec
from trainer_svc.engine.setup import prepare

MakeSpec = Callable[..., RunSpec]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def untied_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose output head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_dir, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return folder


def full(**changes: bool) -> dict[str, Any]:
    off = {"activation_checkpointing": False, "memory_efficient_fsdp_wrap": False, "fsdp_cpu_offload": False}
    return {"kind": "full"} | off | changes


def write_facts(group: ProcessGroup, spec: RunSpec) -> None:
    """Takes one step and writes down where the weights are while it goes on."""
    spec.output_dir.mkdir(exist_ok=True)
    events = EventLog(spec.output_dir, silent=True)
    workload = prepare(spec, group, events)
    whole_in_mid_pass: list[bool] = []
    embedding = workload.base.get_input_embeddings()
    sharding.decoder_layers(workload.base)[1].register_forward_hook(
        lambda *_: whole_in_mid_pass.append(not isinstance(embedding.weight, DTensor))
    )
    kept_bytes = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept_bytes[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        GradientComputer(spec, group, events, workload).compute(workload.training.examples[:4], 1)
    workload.optimizer.step()
    parameters = list(workload.model.parameters())
    states = [slot for slots in workload.optimizer.state.values() for slot in slots.values() if slot.ndim]
    facts = {
        "local_weights": sum(local(parameter).numel() for parameter in parameters),
        "local_gradients": sum(local(parameter.grad).numel() for parameter in parameters),
        "local_optimizer_state": sum(local(state).numel() for state in states),
        "all_weights": sum(parameter.numel() for parameter in parameters),
        "embedding_is_whole_in_mid_pass": any(whole_in_mid_pass),
        "bytes_kept_for_backward": kept_bytes[0],
    }
    (spec.output_dir / f"rank-{group.rank}.json").write_text(json.dumps(facts))


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def facts_of(spec: RunSpec, num_processes: int = 2) -> list[dict[str, Any]]:
    spec.output_dir.mkdir()
    assert in_ranks(num_processes, write_facts, spec)
    return [json.loads((spec.output_dir / f"rank-{rank}.json").read_text()) for rank in range(num_processes)]


def test_each_process_holds_half_of_everything(make_spec: MakeSpec) -> None:
    for facts in facts_of(make_spec(method=full())):
        for name in ("local_weights", "local_gradients"):
            assert facts[name] == pytest.approx(facts["all_weights"] / 2, rel=0.01)
        assert facts["local_optimizer_state"] == pytest.approx(facts["all_weights"], rel=0.01)  # two moments


@pytest.mark.parametrize("wrap", [True, False])
def test_memory_efficient_wrap_shards_the_embedding_apart(
    wrap: bool, make_spec: MakeSpec, untied_dir: Path
) -> None:
    spec = make_spec(base_model_dir=untied_dir, method=full(memory_efficient_fsdp_wrap=wrap))
    for facts in facts_of(spec):
        assert facts["embedding_is_whole_in_mid_pass"] is not wrap


def test_activation_checkpointing_keeps_less_for_the_backward_pass(make_spec: MakeSpec) -> None:
    [without] = facts_of(make_spec("without", method=full()), 1)
    [on] = facts_of(make_spec("on", method=full(activation_checkpointing=True)), 1)
    assert on["bytes_kept_for_backward"] < without["bytes_kept_for_backward"] / 2


def test_cpu_offload_is_a_policy_of_every_shard(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    """Where there is no GPU nothing can be moved off it: here only the request to PyTorch is seen."""
    policies: list[Any] = []
    monkeypatch.setattr(
        sharding, "fully_shard", lambda module, mesh, offload_policy: policies.append(offload_policy)
    )
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    said = sharding.shard(model, FullMethod(), ProcessGroup(0, 2, torch.device("cuda")))
    assert policies
    assert all(isinstance(policy, CPUOffloadPolicy) for policy in policies)
    assert "kept in the host's memory" in said


@needs_gpu
def test_offloaded_shards_live_in_the_hosts_memory(make_spec: MakeSpec) -> None:
    """A GPU that computes has them for the time of a layer; and the losses are those of weights that stay."""
    spec = make_spec(method=full(fsdp_cpu_offload=True))
    assert in_ranks(1, assert_on_the_cpu, spec)


def assert_on_the_cpu(_group: ProcessGroup, spec: RunSpec) -> None:
    """In the one process of a group: what is offloaded doesn't depend on how many share it."""
    losses = []
    for offloads in (False, True):
        model = load_base_model(spec.base_model_dir, torch.float32, CPU if offloads else DEVICE).model
        if offloads:
            dist.init_process_group("cpu:gloo,cuda:nccl")
            group = ProcessGroup(0, 1, DEVICE)
            assert speed_up(model, torch.float32)
            assert isinstance(spec.method, FullMethod)
            assert "kept in the host's memory" in sharding.shard(model, spec.method, group)
        tokenizer = AutoTokenizer.from_pretrained(spec.base_model_dir)
        rows = load_examples(spec.training_file, tokenizer, 200, "refuse").examples
        optimizer = make_optimizer(model.parameters(), spec)
        for _ in range(3):
            loss = summed_loss(model, make_pack(rows, DEVICE), torch.float32, packs_rows=True)
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            held = [(parameter, parameter.grad) for parameter in model.parameters()]
            optimizer.zero_grad()
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    state = [slot for slots in optimizer.state.values() for slot in slots.values() if slot.ndim]
    tensors = [*itertools.chain.from_iterable(held), *state]
    assert {local(tensor).device.type for tensor in tensors} == {"cpu"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({"kind": "lora"}, id="lora"),
        pytest.param(full(activation_checkpointing=True, memory_efficient_fsdp_wrap=True), id="full"),
    ],
)
def test_two_processes_give_the_losses_of_one(
    method: dict[str, Any], make_spec: MakeSpec, run_engine: Any, untied_dir: Path, rows_file: Path
) -> None:
    changes = {"method": method, "base_model_dir": untied_dir, "validation_file": rows_file}
    one: Run = run_engine(make_spec("one", batch_size=6, **changes))
    # 13 rows: in the last step of an epoch the second process has none.
    assert run_ranks(make_spec("two", batch_size=3, **changes), 2)
    two = read_run(make_spec("two", **changes).output_dir)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert two.of_kind("validation")[-1]["loss"] == pytest.approx(
        one.of_kind("validation")[-1]["loss"], rel=1e-4
    )
    assert len(two.of_kind("finished")) == 1
