"""docs/configuration.md has every table that the code's own classes make, and no other.

Run as a program, it writes the tables into the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dataset_svc.data_sources import _LONGEST_URI
from dataset_svc.settings import DatasetSettings
from gateway import routes
from gateway.__main__ import GatewayEnvironment
from gateway.authz.accounts import LOOKUP_SECONDS
from gateway.authz.settings import AuthzSettings
from gateway.render import MAX_JSON_BYTES, GatewaySettings
from inference_svc.settings import InferenceSettings
from job_svc import config_request, csv_job_request
from job_svc.config_request import FineTuningOptionsBody, FullBody, LoraBody
from job_svc.csv_job_request import HyperparametersBody
from job_svc.jobs import DEFAULT_PAGE, MAX_PAGE
from job_svc.settings import JobSettings
from job_svc.torchrun_overrides import ALLOWED, LONGEST_OVERRIDES
from svc_kit.server import MAX_MESSAGE_BYTES
from svc_kit.settings import DatabaseSettings, ObjectStoreSettings, ServerSettings
from svc_kit.strict_json import MAX_DEPTH
from trainer_svc.engine.run_spec import Extras
from trainer_svc.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "configuration.md"
PAGE = PATH.read_text(encoding="utf-8")
SHARED: tuple[type[BaseModel], ...] = (ServerSettings, DatabaseSettings, ObjectStoreSettings)
SERVICES: tuple[type[BaseModel], ...] = (
    DatasetSettings,
    JobSettings,
    TrainerSettings,
    InferenceSettings,
    AuthzSettings,
)
MEANINGS = {
    "n_epochs": "Passes over the training rows.",
    "batch_size": "Rows a step and process.",
    "lr": "The learning rate.",
    "gradient_accumulation_steps": "Batches whose gradients are summed into one step.",
    "seed": "Draws the order of rows and the adapters' first values.",
    "shuffle": "Whether each epoch draws a new order of rows.",
    "custom_training_options": "LoRA or full fine-tuning; the tables below.",
    "extras": "Further settings of the engine; the table below.",
    "lora_attn_modules": "The attention projections that get adapters, by torchtune's or the model's names.",
    "apply_lora_to_mlp": "Adapters on the feed-forward layers too.",
    "apply_lora_to_output": "An adapter on the output projection too.",
    "lora_rank": "The adapters' rank.",
    "lora_alpha": "The update is scaled by this over the rank.",
    "enable_activation_checkpointing": "Compute activations again in the backward pass: less memory.",
    "memory_efficient_fsdp_wrap": "Shard embedding and output head apart. Several processes only.",
    "fsdp_cpu_offload": "Keep the shards in the host's memory. Several processes with GPUs only.",
    "epochs": "Passes over the training rows.",
    "max_steps": "Ends training after so many steps, where it would go on longer.",
    "learning_rate": "The learning rate.",
    "validation_split": "The share of the rows that is kept for validation.",
}
# What the class doesn't say: the value depends on another field.
DEFAULTS = {
    "lr": " and ".join(
        f"`{rate:g}` for {kind}" for kind, rate in config_request.DEFAULT_LEARNING_RATES.items()
    ),
    "lora_alpha": "twice the rank",
    "custom_training_options": "LoRA with its defaults",
    "max_steps": "no such end",
    "max_sequence_length": "the model's context",
    "packing": "on where the model can",
    "eval_every_steps": "each epoch's end",
    "checkpoint_every_steps": "each epoch's end",
    "keep_checkpoints": "each epoch's",
    "early_stopping_patience": "trains to the end",
}


def shown(value: Any) -> str:
    """A default as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return DEFAULTS.get(name) or shown(field.get_default(call_default_factory=True))


def constraints(field: FieldInfo) -> list[Any]:
    """A field's bounds, those inside of `Annotated[...] | None` among them."""
    found = [*field.metadata]
    for member in get_args(field.annotation):
        for item in getattr(member, "__metadata__", ()):
            found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def takes(schema: dict[str, Any], field: FieldInfo) -> str:
    """What a field takes, in words."""
    schema = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    words = {"array": "list of texts", "string": "text", "boolean": "true or false", "number": "number"}
    parts = [words.get(schema.get("type", ""), schema.get("type", "object"))]
    for bound in constraints(field):
        match bound:
            case annotated_types.Ge(ge):
                parts.append(f"from {ge}")
            case annotated_types.Gt(gt):
                parts.append(f"above {gt}")
            case annotated_types.Le(le) if le != csv_job_request.LARGEST_COUNT:
                parts.append(f"to {le}")
            case annotated_types.Lt(lt):
                parts.append(f"below {lt:,}")
    return " ".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [tuple(head), *map(tuple, rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def settings_table(settings: type[BaseModel], prefix: str = "TUNERY_", leave_out: Iterable[str] = ()) -> str:
    rows = []
    for name, field in settings.model_fields.items():
        if name not in leave_out:
            assert field.description, f"{settings.__name__}.{name} says nothing"
            rows.append((f"`{prefix}{name.upper()}`", default(name, field), field.description))
    return table(("Variable", "Default", "Meaning"), rows)


def own_table(settings: type[BaseModel]) -> str:
    shared = {name for each in SHARED for name in each.model_fields}
    return settings_table(settings, leave_out=shared)


def gateway_table() -> str:
    assert not GatewayEnvironment.model_fields["descriptors"].is_required()
    # Of the package's build, and so nothing to set.
    return settings_table(GatewaySettings, "TUNERY_GATEWAY_", leave_out=("descriptors",))


def body_table(body: type[BaseModel], leave_out: tuple[str, ...] = ()) -> str:
    properties = body.model_json_schema()["properties"]
    rows = [
        (f"`{name}`", takes(properties[name], field), default(name, field), MEANINGS[name])
        for name, field in body.model_fields.items()
        if name not in leave_out
    ]
    return table(("Field", "Takes", "Default", "Meaning"), rows)


def extras_table() -> str:
    assert Extras.__doc__
    attributes = Extras.__doc__.partition("Attributes:\n")[2]
    meanings = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^ {8}(\w+): (.+?)(?=^ {8}\w|\Z)", attributes, re.MULTILINE | re.DOTALL)
    }
    properties = Extras.model_json_schema()["properties"]
    rows = []
    for name, field in Extras.model_fields.items():
        meaning = meanings[name][:1].upper() + meanings[name][1:]
        rows.append((f"`{name}`", takes(properties[name], field), default(name, field), meaning))
    return table(("Key", "Takes", "Default", "Meaning"), rows)


def method_table() -> str:
    method = csv_job_request.METHOD
    rows = [
        ("method", "LoRA"),
        ("rank, alpha", f"{method['rank']}, {method['alpha']}"),
        (
            "adapters on",
            "every linear layer of the blocks: attention and feed-forward, not the output projection",
        ),
        ("rows a step", str(csv_job_request.BATCH_ROWS)),
        ("order of rows", "a new one each epoch, by the seed 0"),
    ]
    assert method["kind"] == "lora"
    assert method["attn_modules"] == config_request.ATTENTION_MODULES
    assert (method["apply_to_mlp"], method["apply_to_output"]) == (True, False)
    return table(("What", "Value"), rows)


def overrides_table() -> str:
    return table(("Option", "Takes"), [(f"`{name}`", takes) for name, (takes, _) in ALLOWED.items()])


def limits_table() -> str:
    mib = 2**20
    upload = DatasetSettings.model_fields["max_upload_bytes"].default
    assert upload == GatewaySettings.model_fields["max_upload_bytes"].default
    rows = [
        ("A body that is no upload", f"{MAX_JSON_BYTES // mib} MiB", "fixed"),
        (
            "An uploaded file",
            f"{upload // 2**30} GiB",
            "`TUNERY_MAX_UPLOAD_BYTES` and `TUNERY_GATEWAY_MAX_UPLOAD_BYTES`",
        ),
        ("A message of a native stream", f"{MAX_MESSAGE_BYTES // mib} MiB", "fixed"),
        ("Path and headers", "60 KiB together, 100 in number", "fixed"),
        ("Nesting of a JSON body", f"{MAX_DEPTH} levels", "fixed"),
        ("A data URI", f"{_LONGEST_URI:,} characters", "fixed"),
        ("`overrides`", f"{LONGEST_OVERRIDES:,} characters", "fixed"),
        ("`metadata`", f"{config_request.LONGEST_METADATA_BYTES // 2**10} KiB of JSON", "fixed"),
        ("Jobs on a page", f"{MAX_PAGE}, by default {DEFAULT_PAGE}", "fixed"),
        ("Time for an answer", f"{routes.DEFAULT_SECONDS} s", "fixed"),
        ("Time for making a job", f"{routes.SUBMIT_SECONDS} s", "fixed"),
        ("Time for a report on a dataset", f"{routes.REPORT_SECONDS} s", "fixed"),
        ("Time for a chat", f"{routes.CHAT_SECONDS} s", "fixed"),
        ("Silence of a log that is followed", f"{routes.TAIL_IDLE_SECONDS // 3600} h", "fixed"),
        ("Silence of an upload or a download", f"{routes.TRANSFER_IDLE_SECONDS} s", "fixed"),
        (
            "Headers that come slowly",
            f"{GatewaySettings.model_fields['request_headers_timeout_seconds'].default:g} s",
            "`TUNERY_GATEWAY_REQUEST_HEADERS_TIMEOUT_SECONDS`",
        ),
        ("A key taken back still works for", f"{LOOKUP_SECONDS:g} s", "fixed"),
    ]
    return table(("What", "Limit", "Set by"), rows)


TABLES = {
    **{settings.__name__: settings_table(settings) for settings in SHARED},
    **{settings.__name__: own_table(settings) for settings in SERVICES},
    "gateway": gateway_table(),
    "limits": limits_table(),
    "contract A": body_table(HyperparametersBody),
    "contract A, fixed": method_table(),
    "contract B": body_table(FineTuningOptionsBody),
    "contract B, LoRA": body_table(LoraBody, ("finetuning_type",)),
    "contract B, full": body_table(FullBody, ("finetuning_type",)),
    "extras": extras_table(),
    "overrides": overrides_table(),
}
MARKED = re.compile(r"<!-- table: (.+?) -->\n(?:\|.*\n)*")


def with_tables(page: str) -> str:
    """The page with every table as the code has it now."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]}\n", page)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table(name: str) -> None:
    expected = f"<!-- table: {name} -->\n{TABLES[name]}\n\n"
    assert expected in PAGE, f"run `python {__file__}`, or write:\n\n{expected}"


def test_the_page_has_no_table_that_the_code_does_not_know() -> None:
    assert sorted(MARKED.findall(PAGE)) == sorted(TABLES)
    text = MARKED.sub("", PAGE)
    assert not re.findall(r"^\| `(?!TUNERY_\w+` \| [^|]+ \|$).*", text, re.MULTILINE)


def test_every_variable_named_is_one_that_is_read() -> None:
    known = {f"TUNERY_{name.upper()}" for each in SERVICES for name in each.model_fields}
    known |= {f"TUNERY_GATEWAY_{name.upper()}" for name in GatewayEnvironment.model_fields}
    known |= {"TUNERY_URL", "TUNERY_API_KEY", "TUNERY_GATEWAY"}
    assert set(re.findall(r"TUNERY_[A-Z0-9_]*[A-Z0-9]", PAGE)) <= known


def test_what_tunery_up_decides_is_what_its_stack_sets() -> None:
    section = PAGE.partition("## What `tunery up` decides")[2]
    told = set(re.findall(r"^\| `(TUNERY_\w+)`", section, re.MULTILINE))
    set_there = set(re.findall(r'"(TUNERY_\w+)"', (ROOT / "tunery" / "stack.py").read_text()))
    assert told == set_there - {"TUNERY_URL", "TUNERY_API_KEY", "TUNERY_"}


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (PATH.parent / link).exists(), link


if __name__ == "__main__":
    PATH.write_text(with_tables(PAGE), encoding="utf-8")
