"""What goes to Weights & Biases where its server can't be reached, and where a run goes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer_svc.engine.run_spec import RunSpec

pytest.importorskip("wandb")

# In processes of their own: wandb reads its environment once, and keeps the run that was started last.
TRACK = """
import json, sys
from pathlib import Path
from trainer_svc.engine import wandb_tracking
from trainer_svc.engine.run_spec import RunSpec
wandb_tracking._INIT_SECONDS = 3
tracked = wandb_tracking.start_wandb(RunSpec.model_validate_json(Path(sys.argv[1]).read_text()))
for step in map(int, sys.argv[2:]):
    tracked.record({"kind": "validation", "step": step, "loss": 0.5})
tracked.finish()
print(json.dumps([tracked.place, tracked.url]))
"""
# The file is a log in LevelDB's format: parts of records, none of which crosses a block's border.
READ = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
data, place, record, steps = Path(sys.argv[1]).read_bytes(), 7, b"", []
while place < len(data):
    left_in_block = 32768 - place % 32768
    if left_in_block < 7:
        place += left_in_block
        continue
    _, length, part = struct.unpack_from("<IHB", data, place)
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if part in (1, 4):  # the whole, or the last
        items = Record.FromString(record).history.item
        steps += [json.loads(item.value_json) for item in items if "step" in (item.key, *item.nested_key)]
        record = b""
print(json.dumps(steps))
"""


def run_script(script: str, *arguments: str, **environment: str) -> Any:
    """Returns what a script prints, as JSON, last."""
    services = str(Path(__file__).parents[3] / "services")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own = inherited | {"PYTHONPATH": services} | environment
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=own | {"PYTHONPATH": services} | environment,
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def spec(make_spec: Callable[..., RunSpec]) -> RunSpec:
    spec = make_spec(wandb_project="tests")
    spec.output_dir.mkdir()
    (spec.output_dir / "spec.json").write_text(spec.model_dump_json())
    return spec


def offline_run(spec: RunSpec) -> Path:
    [run_file] = (spec.output_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return run_file


def test_steps_of_a_run_that_goes_back_are_kept(spec: RunSpec) -> None:
    steps = [1, 2, 3, 2, 3, 4]
    place, url = run_script(TRACK, str(spec.output_dir / "spec.json"), *map(str, steps))
    assert (place.partition(";")[0], url) == ("offline, since WANDB_API_KEY isn't set", None)
    assert run_script(READ, str(offline_run(spec))) == steps


@pytest.mark.parametrize(
    ("key", "why"), [("a" * 40, "connection refused"), ("short", "API key must have 40")]
)
def test_a_run_whose_server_cannot_be_used_is_an_offline_one(key: str, why: str, spec: RunSpec) -> None:
    nowhere = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    place, url = run_script(TRACK, str(spec.output_dir / "spec.json"), "1", **nowhere)
    assert url is None
    assert place.startswith("offline, since its server can't be used (")
    assert why in place
    assert place.endswith("`wandb sync` uploads its files")
    assert run_script(READ, str(offline_run(spec))) == [1]
