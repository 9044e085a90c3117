"""Puts LoRA adapters on a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
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
        JobFault: the method names a matrix that the model doesn't have; the message lists those it has. Or
            DoRA is asked for on a matrix that it can't be put on.
    """
    modules = target_modules(model, method)
    if extras.lora_variant == "dora":
        _check_no_zero_rows(model, modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_id,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=extras.lora_dropout,
        use_rslora=extras.lora_variant == "rslora",
        use_dora=extras.lora_variant == "dora",
        target_modules=modules,
    )
    # peft writes this name into the adapter's config, and else the folder that the model was loaded from.
    model.name_or_path = base_model_id
    with _tied_heads_allowed():
        # peft still asks by transformers' old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _check_no_zero_rows(model: PreTrainedModel, modules: list[str]) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in modules and isinstance(module, nn.Linear):
            num_zero_rows = int((dequantize_module_weight(module).detach().norm(dim=1) == 0).sum())
            if num_zero_rows:
                raise JobFault(
                    f"lora_variant dora divides by the norm of each row of {name}, and {num_zero_rows} of "
                    "them are zero (of tokens that are never used, in an output head); leave the matrix out, "
                    "or take lora or rslora"
                )


def load_adapters(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a stored adapter beside the model's matrices.

    Raises:
        OSError: and others of peft's, when the folder is damaged or of another model.
    """
    with _tied_heads_allowed():
        return PeftModel.from_pretrained(model, str(folder))


@contextmanager
def _tied_heads_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft warns that an adapted output head is tied to the embedding. Merging would then change both;
        # adapters that stay apart are right, and `merging.py` unties the two.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        yield


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
