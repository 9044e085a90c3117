from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings
from tests.conftest import RunningStack, wait_until
from tests.contract.account import ENDED, Account, dialogs_jsonl, ok, qa_csv
from tests.contract.processes import service_process
from tests.contract.samples import METADATA, SUFFIX_OF_64
from tests.contract.watch import Watch, watch

# Waiting for the one trainer's queue; a test alone takes much less.
_QUEUE_SECONDS = 900
_NAMES = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs first what needs no trained job, while those train, and last what wants the trainer busy."""
    here = Path(__file__).parent
    own = [index for index, item in enumerate(items) if here in item.path.parents]

    def turn(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 2 if "busy_trainer" in names else 1 if "trained" in names else 0

    for index, item in zip(own, sorted((items[index] for index in own), key=turn), strict=True):
        items[index] = item
        if turn(item):
            item.add_marker(pytest.mark.timeout(_QUEUE_SECONDS))


@pytest.fixture(scope="session")
def new_account(stack: RunningStack) -> Iterator[Callable[..., Account]]:
    """Makes accounts."""
    with contextlib.ExitStack() as clients:

        def make(credits: float | None = None) -> Account:
            account = Account(stack.url, stack.new_account(f"contract-{next(_NAMES)}", credits))
            clients.enter_context(account.http)
            return account

        yield make


@pytest.fixture(scope="module")
def account(new_account: Callable[..., Account]) -> Account:
    """An account of a module's own."""
    return new_account()


@pytest.fixture(scope="session")
def other_account(new_account: Callable[..., Account]) -> Account:
    """An account that owns nothing."""
    return new_account()


@dataclass
class Trained:
    """Jobs that train one after the other while other tests run.

    Attributes:
        account: keeps a balance.
        datasets: their ids, by what they are for.
        jobs: the jobs' ids, by what they are for.
        sent: the Configs of those that were submitted by the second contract.
        watches: what is seen of a job from its first moment on.
    """

    account: Account
    datasets: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    watches: dict[str, Watch] = field(default_factory=dict)


@pytest.fixture(scope="session")
def trained(new_account: Callable[..., Account], import_folder: Path) -> Iterator[Trained]:
    """Submits every job that the tests of this folder train to its end; tests wait for those they need."""
    trained = Trained(new_account(credits=1000))
    account = trained.account

    rows = "System,CONTEXT,Question,aNsWeR,id\n" + "".join(
        f"Be brief.,{n} is a number.,What is {n} plus one?,It is {n + 1}.,{n}\n" for n in range(16)
    )
    trained.datasets["qa"] = account.dataset(rows)
    trained.jobs["qa"] = account.create_job(
        trained.datasets["qa"],
        hyperparameters={"epochs": 2, "validation_split": 0.25, "learning_rate": 1e-3},
        suffix=SUFFIX_OF_64,
    )
    with contextlib.ExitStack() as watches:
        trained.watches["qa"] = watches.enter_context(watch(account, trained.jobs["qa"]))

        def submit(name: str, **config: Any) -> None:
            trained.sent[name] = config
            trained.jobs[name] = ok(account.http.post("/fine_tuning/jobs/submit", json=config))["job_id"]

        trained.datasets["dialogs"] = account.dialogs(dialogs_jsonl(8))
        trained.datasets["validation"] = account.dialogs(dialogs_jsonl(2))
        submit(
            "lora",
            model="tunery-tiny",
            data=f"dataset://{trained.datasets['dialogs']}",
            validation_data=f"dataset://{trained.datasets['validation']}",
            fine_tuning_options={
                "n_epochs": 2,
                "batch_size": 2,
                "lr": 1e-3,
                "gradient_accumulation_steps": 2,
                "seed": 4294967295,
                "shuffle": False,
                "custom_training_options": {
                    "finetuning_type": "LoraFineTuneOptions",
                    "lora_attn_modules": ["q_proj", "v_proj"],
                    "apply_lora_to_mlp": True,
                    "apply_lora_to_output": False,
                    "lora_rank": 4,
                    "lora_alpha": 8,
                },
                "extras": {"warmup_steps": 1, "lr_scheduler": "cosine", "weight_decay": 0.1},
            },
            logger={"log_type": "DiskLogger", "filename": "my-run.log"},
            overrides="--nproc_per_node 1 --max-restarts=0",
            metadata=METADATA,
        )
        (import_folder / "rows é.jsonl").write_text(dialogs_jsonl(4))
        submit(
            "full",
            model="tunery-tiny",
            data=f"{import_folder.as_uri()}/rows%20%C3%A9.jsonl",
            fine_tuning_options={
                "n_epochs": 1,
                "custom_training_options": {
                    "finetuning_type": "full",
                    "enable_activation_checkpointing": False,
                    "memory_efficient_fsdp_wrap": False,
                    "fsdp_cpu_offload": False,
                },
            },
        )
        submit(
            "refused",
            model="tunery-tiny",
            data=f"dataset://{trained.datasets['dialogs']}",
            fine_tuning_options={"extras": {"max_sequence_length": 3, "long_rows": "refuse"}},
        )
        trained.datasets["text"] = account.dataset("TEXT\n" + "Some words to be learnt by heart.\n" * 24)
        trained.jobs["early"] = account.create_job(
            trained.datasets["text"],
            task_type="not_qa",
            hyperparameters={"epochs": 2**31 - 1, "max_steps": 4, "learning_rate": 1},
        )
        yield trained


@pytest.fixture(scope="session", autouse=True)
def _train_meanwhile(request: pytest.FixtureRequest) -> None:
    """Starts the training jobs before the first test, if any test wants them."""
    if any("trained" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("trained")


class BusyTrainer:
    """The stack's one trainer, kept busy by a job that would take hours.

    After its first step the run stands still, or it would take a processor from all other tests.
    """

    def __init__(self, account: Account, stack: RunningStack) -> None:
        self.account = account
        self._stack = stack
        self._dataset_id = account.dataset(qa_csv(2000))
        self._job_id: str | None = None

    @property
    def job_id(self) -> str:
        """The running job. A new one is made when the last one has ended."""
        if self._job_id is None or self.account.job(self._job_id)["status"] in ENDED:
            settings = {"epochs": 200, "learning_rate": 1e-5}
            self._job_id = self.account.create_job(self._dataset_id, hyperparameters=settings)
            self.account.wait(self._job_id, "running")
            wait_until(lambda: "training_metrics" in self.account.job(self._job_id or ""), 120, "a step")
            self._pause()
        return self._job_id

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Has the run go on for the block's time."""
        for process in self._processes():
            process.resume()
        yield
        self._pause()

    def _pause(self) -> None:
        for process in self._processes():
            process.suspend()

    def _processes(self) -> list[psutil.Process]:
        assert self._job_id is not None
        found = psutil.Process(self._stack.process.pid).children(recursive=True)
        return [process for process in found if any(self._job_id in part for part in process.cmdline())]

    def stop(self) -> None:
        if self._job_id is not None and self.account.job(self._job_id)["status"] not in ENDED:
            self.account.cancel(self._job_id)


@pytest.fixture(scope="session")
def busy_trainer(
    new_account: Callable[..., Account], stack: RunningStack, request: pytest.FixtureRequest
) -> Iterator[BusyTrainer]:
    """Keeps every other job queued."""
    trainer = BusyTrainer(new_account(credits=1_000_000), stack)
    assert trainer.job_id
    yield trainer
    trainer.stop()


@pytest.fixture
def queued(busy_trainer: BusyTrainer, account: Account) -> Iterator[Callable[[str], str]]:
    """Waits until a job of `account` is queued for good, and cancels it after the test."""
    jobs: list[str] = []

    def wait(job_id: str) -> str:
        jobs.append(job_id)
        account.wait_status(job_id, "queued")
        return job_id

    assert busy_trainer.job_id
    yield wait
    for job_id in jobs:
        if account.job(job_id)["status"] not in ENDED:
            account.cancel(job_id)


@pytest.fixture(scope="session")
def stack_environment(stack: RunningStack) -> dict[str, str]:
    """The settings of the stack's services."""
    return service_process(stack, "dataset_svc").environ()


@pytest.fixture(scope="session")
def import_folder(stack_environment: dict[str, str]) -> Path:
    """The folder that file:// URIs may name."""
    return Path(json.loads(stack_environment["TUNERY_IMPORT_FILE_ROOTS"])[0])


@pytest.fixture(scope="session")
def object_store(stack_environment: dict[str, str]) -> ObjectStore:
    """The stack's object store, with its own keys."""
    own = {
        name.removeprefix("TUNERY_").lower(): value
        for name, value in stack_environment.items()
        if name.startswith("TUNERY_S3_")
    }
    return ObjectStore(ObjectStoreSettings.model_validate(own))


@pytest.fixture(scope="session")
def stored_keys(object_store: ObjectStore) -> Callable[[str], list[str]]:
    """Lists the keys under a prefix."""

    def keys(prefix: str) -> list[str]:
        return [stored.key for stored in asyncio.run(object_store.list(prefix))]

    return keys
