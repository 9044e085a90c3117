"""Random requests after both contracts: no 5xx, no answer that they and docs/errors.md don't know.

They come from an account without credits, so that not even a faultless request starts a training run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.contract.account import Account
from tests.contract.contracts import check_response, read_first, read_second

EXAMPLES = 30
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


@pytest.fixture(scope="session")
def poor_account(new_account: Callable[..., Account]) -> Account:
    return new_account(credits=0)


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
    response = case.call(base_url=base_url, headers={"Authorization": f"Bearer {account.api_key}"})
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
