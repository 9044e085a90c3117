"""Spreads a model's weights over the processes of a run: FSDP2 (Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import FullMethod


def shard(model: PreTrainedModel, method: FullMethod, group: ProcessGroup) -> str:
    """Shards the model in place, layer by layer: each process holds a part of every weight.

    A layer's weights are whole only while it is computed. Weights, their gradients and the optimizer's state
    take 1/world_size of their memory. Gradients are summed over the processes, not averaged, since the
    loss is normalised by the targets of all of them.

    Args:
        model: every process holds the same weights.
        method: `memory_efficient_fsdp_wrap` shards the embedding and the output head apart, so that they are
            whole only while they are used; otherwise they are whole from the first layer to the last.
            `fsdp_cpu_offload` keeps the shards in the host's memory between uses.
        group: more than one process.

    Returns:
        What was done, for people.

    Raises:
        JobFault: the model's layers can't be told.
    """
    parts: list[nn.Module] = list(decoder_layers(model))
    said = [f"weights sharded over {group.world_size} processes"]
    if method.memory_efficient_fsdp_wrap:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head.weight is embedding.weight:
            said.append("the embedding is the output head too and stays whole during a pass")
        else:
            parts += [embedding, head]
            said.append("embedding and output head apart")
    offload = OffloadPolicy()
    if method.fsdp_cpu_offload and group.device.type == "cpu":
        said.append("in the host's memory, where a run without a GPU has them anyway")
    elif method.fsdp_cpu_offload:
        offload = CPUOffloadPolicy()
        said.append("kept in the host's memory between uses")
    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for module in (*parts, model):
        fully_shard(module, mesh=mesh, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gloo knows no premultiplied sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return ", ".join(said)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers: its longest list of modules.

    Raises:
        JobFault: it has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise JobFault("this base model has no list of layers, so it can't be sharded; use one process")
    return max(lists, key=len)
