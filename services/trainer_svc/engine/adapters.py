"""Puts LoRA adapters on a model."""

from __future__ import annotations

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.run_spec import Extras, LoraMethod

# torchtune's name for the attention's last matrix, which transformers calls by others.
_ALIASES = {"output_proj": ("o_proj", "out_proj", "c_proj", "dense")}
_MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
_MLP_ALIASES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def add_adapters(model: PreTrainedModel, method: LoraMethod, extras: Extras, base_model_id: str) -> PeftModel:
    """Freezes the model and puts adapters beside the matrices that the method names.

    Adapters are float32 whatever the model's weights are. Their update starts at zero; the first weights
    come from torch's global generator.

    Args:
        model: changed in place.
        method: which matrices, at which rank.
        extras: the adapters' dropout and variant.
        base_model_id: what the adapter's config calls the base model.

    Raises:
        JobFault: the method names a matrix that the model doesn't have; the message lists those it has.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_id,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=extras.lora_dropout,
        use_rslora=extras.lora_variant == "rslora",
        use_dora=extras.lora_variant == "dora",
        target_modules=target_modules(model, method),
    )
    # peft writes this name into the adapter's config, and else the folder that the model was loaded from.
    model.name_or_path = base_model_id
    with warnings.catch_warnings():
        # peft warns that an adapted output head is tied to the embedding. Merging would then change
        # both; adapters that stay apart, as ours do, are right.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # peft still asks by transformers' old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def target_modules(model: PreTrainedModel, method: LoraMethod) -> list[str]:
    """The names, in the model, of the matrices to adapt.

    Raises:
        JobFault: see `add_adapters`.
    """
    output_name = _output_head_name(model)
    known = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    } - {output_name}
    chosen = {_resolve(name, known) for name in method.attn_modules}
    if method.apply_to_mlp:
        chosen |= {_resolve(name, known) for name in _MLP_MODULES}
    if method.apply_to_output:
        chosen.add(output_name)
    return sorted(chosen)


def _resolve(name: str, known: set[str]) -> str:
    candidates = (name, *_ALIASES.get(name, ()), _MLP_ALIASES.get(name, name))
    for candidate in candidates:
        if candidate in known:
            return candidate
    raise JobFault(
        f"this base model has no module {name!r} for an adapter; it has {', '.join(sorted(known))} "
        "(output_proj is accepted for the attention's last matrix)"
    )


def _output_head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name.rpartition(".")[2]
    raise JobFault("this base model has no output head")
