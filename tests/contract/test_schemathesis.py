"""Random requests after both contracts and the extensions: no 5xx, no hang, no answer that they and
docs/errors.md don't know, and no memory that goes on growing.

They come from an account without credits, so that not even a faultless request starts a training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import schemathesis
import yaml
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.cases import num_cases
from tests.conftest import RunningStack
from tests.contract.account import Account
from tests.contract.contracts import check_response, read_first, read_second

# Of all tests together: about a thousand come from the examples and edges of the schemas, the rest is random,
# spread over the operations that take more than a few requests that differ.
CASES = num_cases(2000)
EXAMPLES = math.ceil((CASES - 1000) / 18)
ANSWER_SECONDS = 30
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]

bounded = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)

FIRST = schemathesis.openapi.from_dict(read_first())
SECOND = schemathesis.openapi.from_dict(read_second())
PAGES = Path(__file__).parents[2] / "docs" / "openapi"
FIRST_PAGE = schemathesis.openapi.from_dict(yaml.safe_load((PAGES / "fine-tuning-api.yaml").read_text()))
SECOND_PAGE = schemathesis.openapi.from_dict(yaml.safe_load((PAGES / "config-api.yaml").read_text()))
# Between the half of the requests and the end, of each process; caches fill up before.
MAX_GROWTH_BYTES = 50_000_000
num_sent = 0
memory_at_half: dict[str, int] = {}


def memory_of(stack: RunningStack) -> dict[str, int]:
    """Resident bytes of each process of the stack."""
    children = psutil.Process(stack.process.pid).children()
    return {f"{' '.join(child.cmdline()[:4])} ({child.pid})": child.memory_info().rss for child in children}


@pytest.fixture(scope="session")
def poor_account(new_account: Callable[..., Account]) -> Account:
    return new_account(credits=0)


@pytest.fixture(autouse=True)
def _memory_at_half(stack: RunningStack) -> None:
    if num_sent >= CASES / 2 and not memory_at_half:
        memory_at_half.update(memory_of(stack))


@pytest.fixture(scope="session")
def existing(poor_account: Account) -> dict[str, Any]:
    """Values that requests get in place of random ones, so that they come further."""
    data = f"dataset://{poor_account.dialogs()}"
    return {
        **{"base_model": "tunery-tiny", "dataset_id": poor_account.dataset()},
        **{"model": "tunery-tiny", "data": data, "validation_data": data},
        **{"n_epochs": 2, "batch_size": 4, "lr": 0.1, "gradient_accumulation_steps": 2, "seed": 7},
        **{"lora_rank": 4, "lora_alpha": 8, "lora_attn_modules": ["q_proj"], "extras": {}},
        **{"overrides": "--nnodes 1", "filename": "a.log", "project": "p"},
    }


def send(account: Account, case: Any, base_url: str) -> None:
    global num_sent
    num_sent += 1
    headers = {"Authorization": f"Bearer {account.api_key}"}
    response = case.call(base_url=base_url, headers=headers, timeout=ANSWER_SECONDS)
    request = response.request
    # The same judge as for every other test, which knows httpx's responses.
    headers = {name: ", ".join(values) for name, values in response.headers.items()}
    judged = httpx.Response(
        response.status_code,
        headers={name: value for name, value in headers.items() if name != "content-encoding"},
        content=response.content,
        request=httpx.Request(request.method, request.url),
    )
    if judged.status_code != 400 or "path is malformed" not in judged.text:
        check_response(judged)
    case.validate_response(response, checks=CHECKS)


def is_extension(context: Any) -> bool:
    return bool(context.operation.definition.raw.get("x-extension"))


def with_existing(value: Any, existing: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {
            name: existing[name] if name in existing else with_existing(item, existing)
            for name, item in value.items()
        }
    return value


@FIRST.parametrize()
@bounded
def test_first_contract(case: Any, poor_account: Account) -> None:
    send(poor_account, case, f"{poor_account.url}/api/v1")


@SECOND.parametrize()
@bounded
def test_second_contract(case: Any, poor_account: Account) -> None:
    send(poor_account, case, poor_account.url)


@FIRST.include(method="POST", path="/fine-tuning/jobs").parametrize()
@bounded
def test_jobs_of_existing_things(case: Any, poor_account: Account, existing: dict[str, Any]) -> None:
    case.body = with_existing(case.body, existing)
    send(poor_account, case, f"{poor_account.url}/api/v1")


@SECOND.include(path="/fine_tuning/jobs/submit").parametrize()
@bounded
def test_configs_of_existing_things(case: Any, poor_account: Account, existing: dict[str, Any]) -> None:
    case.body = with_existing(case.body, existing)
    send(poor_account, case, poor_account.url)


@FIRST_PAGE.include(is_extension).parametrize()
@bounded
def test_extensions_of_the_first_contract(case: Any, poor_account: Account) -> None:
    prefix = (
        "" if case.path.startswith("/v1/") else "/api/v1"
    )  # chat is where the openai package looks for it
    send(poor_account, case, f"{poor_account.url}{prefix}")


@SECOND_PAGE.include(is_extension).parametrize()
@bounded
def test_extensions_of_the_second_contract(case: Any, poor_account: Account) -> None:
    send(poor_account, case, poor_account.url)


def test_it_was_that_many_and_no_memory_grew(request: pytest.FixtureRequest, stack: RunningStack) -> None:
    tests = [item for item in request.session.items if item.path == request.path]
    if len(tests) < 20:
        pytest.skip("some of the tests were left out")
    assert num_sent >= CASES, num_sent
    growth = {name: bytes_ - memory_at_half[name] for name, bytes_ in memory_of(stack).items()}
    assert max(growth.values()) < MAX_GROWTH_BYTES, growth
