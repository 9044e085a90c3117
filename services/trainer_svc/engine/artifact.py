"""The folder that a run leaves: what peft or transformers load, and a model card."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from trainer_svc.engine.run_spec import MERGED_DIR, LoraMethod, RunSpec

ARTIFACT_DIR = "artifact"


@dataclass(frozen=True)
class CardFacts:
    """What the model card says beside the specification.

    Attributes:
        training_sha256: of the training file.
        num_rows: rows trained on.
        num_tokens_trained: input tokens over all steps.
        steps: optimizer steps done.
        epochs_completed: whole epochs done.
        training_loss: of the last step.
        validation_loss: at the last epoch's end; None without validation.
        dtype: number format of the matrix products.
    """

    training_sha256: str
    num_rows: int
    num_tokens_trained: int
    steps: int
    epochs_completed: int
    training_loss: float | None
    validation_loss: float | None
    dtype: str


def model_card(spec: RunSpec, facts: CardFacts) -> str:
    """The artifact's README.md, with the front matter that the Hugging Face hub reads."""
    is_lora = isinstance(spec.method, LoraMethod)
    front = [
        "---",
        f"base_model: {spec.base_model_id}",
        f"library_name: {'peft' if is_lora else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"license: {spec.base_model_licence}"] if spec.base_model_licence else []),
        f"tags: [{'lora, ' if is_lora else ''}tunery]",
        "---",
    ]
    method = spec.method.model_dump(exclude={"kind"})
    rows = {
        "Base model": spec.base_model_id,
        "Licence of the base model": spec.base_model_licence or "not recorded",
        "Trained": f"{datetime.now(UTC):%Y-%m-%d}, by Tunery",
        "Training data": f"{facts.num_rows:,} rows, SHA-256 `{facts.training_sha256}`",
        "Method": "LoRA" if is_lora else "full",
        **{f"Method: {name}": _shown(value) for name, value in method.items()},
        "Epochs completed": f"{facts.epochs_completed} of {spec.epochs}",
        "Optimizer steps": f"{facts.steps:,}",
        "Tokens trained on": f"{facts.num_tokens_trained:,}",
        "Batch size": f"{spec.batch_size} × {spec.gradient_accumulation_steps} accumulated",
        "Learning rate": f"{spec.learning_rate:g}, {spec.extras.lr_scheduler}",
        "Warm-up steps": spec.extras.warmup_steps,
        "Weight decay": spec.extras.weight_decay,
        "Largest gradient norm": spec.extras.max_grad_norm,
        "Seed": spec.seed,
        "Matrix products in": facts.dtype,
        "Training loss, last step": _loss(facts.training_loss),
        "Validation loss": _loss(facts.validation_loss),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    title = f"# {spec.base_model_id}, fine-tuned"
    return "\n".join([*front, "", title, "", *table, "", "## Use", "", *_usage(spec, is_lora=is_lora), ""])


def _usage(spec: RunSpec, *, is_lora: bool) -> list[str]:
    if not is_lora:
        return ["```python", "AutoModelForCausalLM.from_pretrained(this_folder)", "```"]
    return [
        "```python",
        "base = AutoModelForCausalLM.from_pretrained(base_model_folder)  # " + spec.base_model_id,
        "model = PeftModel.from_pretrained(base, this_folder)",
        "```",
        *(
            ["", f"In `{MERGED_DIR}/` is the model with the adapter merged in."]
            if spec.extras.save_merged
            else []
        ),
    ]


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
