"""`tunery up --replicas`, on PostgreSQL and with TLS between all that it runs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from svc_kit.tls import Tls
from tests.certificates import Authority, variables
from tests.conftest import new_postgres_database
from tests.integration.tunery.running import Result, Up, Ups, many_rows, wait_for

REPLICAS = "dataset=2,job=2,trainer=2"
PROCESSES = {
    "s3", "authz", "inference_svc", "gateway",
    "dataset_svc", "dataset_svc-2", "job_svc", "job_svc-2", "trainer_svc", "trainer_svc-2",
}  # fmt: skip
JOBS = "/api/v1/fine-tuning/jobs"
DATASETS = "/api/v1/fine-tuning/datasets"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def cluster(
    ups: Ups, authority: Authority, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    return ups.start_ready(
        tmp_path_factory.mktemp("cluster") / "data",
        options=("--replicas", REPLICAS),
        TUNERY_DATABASE_URL=new_postgres_database(postgres_url),
        TUNERY_GATEWAY_REQUESTS_PER_SECOND="100000",  # the reader's come without a pause
        TUNERY_GATEWAY_REQUEST_BURST="100000",
        **variables(authority.issue("stack")),
    )


def address(cluster: Up, name: str) -> str:
    return cluster.child(name).environ()["TUNERY_LISTEN"]


def test_each_is_a_process_with_a_name_and_folders_of_its_own(cluster: Up) -> None:
    children = {mark.partition("/")[2]: process.environ() for mark, process in cluster.children().items()}
    assert set(children) == PROCESSES
    logs = {path.name for path in (cluster.data_dir / "logs").iterdir()}
    assert logs >= {f"{name}.log" for name in PROCESSES}
    first, second = children["trainer_svc"], children["trainer_svc-2"]
    assert second["TUNERY_TRAINER_ID"] == f"{first['TUNERY_TRAINER_ID']}-2"
    assert second["TUNERY_WORK_DIR"] == f"{first['TUNERY_WORK_DIR']}-2"
    ports = [each["TUNERY_LISTEN"] for each in children.values() if "TUNERY_LISTEN" in each]
    assert len(set(ports)) == len(ports)
    assert first["TUNERY_JOB_SVC_ADDRESS"].split(",") == [
        children[name]["TUNERY_LISTEN"] for name in ("job_svc", "job_svc-2")
    ]


def health(address: str, tls: Tls | None) -> int:
    channel = (
        grpc.insecure_channel(address) if tls is None
        else grpc.secure_channel(address, tls.channel_credentials())
    )  # fmt: skip
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int(check(health_pb2.HealthCheckRequest(), timeout=5).status)


@pytest.mark.parametrize("name", sorted(PROCESSES - {"s3", "gateway"}))
def test_no_service_takes_plaintext_or_a_strangers_certificate(
    cluster: Up, authority: Authority, tmp_path: Path, name: str
) -> None:
    own, stranger = authority.issue("client"), Authority(tmp_path).issue("stranger")
    assert health(address(cluster, name), own) == health_pb2.HealthCheckResponse.SERVING
    # It believes the service, and has no certificate that the service believes; or believes another.
    without = Tls(stranger.cert_file, stranger.key_file, own.ca_file)
    for tls in (None, stranger, without):
        with pytest.raises(grpc.RpcError) as raised:
            health(address(cluster, name), tls)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


class Reader:
    """Reads through the gateway again and again until told to stop."""

    def __init__(self, cluster: Up) -> None:
        self._cluster = cluster
        self._stop = Event()
        self.num_answers = 0

    def run(self) -> list[str]:
        """Returns what went wrong."""
        failed = []
        headers = {"authorization": f"Bearer {self._cluster.credentials['api_key']}"}
        with httpx.Client(base_url=self._cluster.url, headers=headers, trust_env=False) as client:
            while not self._stop.is_set():
                for path in (JOBS, DATASETS):
                    answer = client.get(path)
                    self.num_answers += 1
                    if answer.status_code != 200:
                        failed.append(f"{path}: {answer.status_code} {answer.text}")
        return failed

    def stop(self) -> None:
        self._stop.set()


@pytest.fixture
def reader(cluster: Up) -> Iterator[Callable[[], list[str]]]:
    """Reads from here on; the call ends it and returns what went wrong."""
    reader = Reader(cluster)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.run)

        def failures() -> list[str]:
            reader.stop()
            found = reading.result(60)
            assert reader.num_answers > 20
            return found

        try:
            yield failures
        finally:
            reader.stop()


@pytest.fixture(scope="module")
def job(cluster: Up) -> dict[str, str]:
    """A job's id, and that of the request that made it."""
    headers = {"authorization": f"Bearer {cluster.credentials['api_key']}"}
    with httpx.Client(base_url=cluster.url, headers=headers, timeout=60, trust_env=False) as client:
        dataset = client.post(DATASETS, files={"file": ("rows.csv", many_rows(320))}).json()["id"]
        settings = {"base_model": "tunery-tiny", "dataset_id": dataset, "task_type": "qa"}
        made = client.post(JOBS, json={**settings, "hyperparameters": {"epochs": 4}})
    assert made.status_code == 201, made.text
    return {"id": made.json()["id"], "request_id": made.headers["x-request-id"]}


def test_a_replica_that_is_killed_is_not_missed(
    cluster: Up, job: dict[str, str], rows_csv: Path, reader: Callable[[], list[str]]
) -> None:
    path = f"{JOBS}/{job['id']}"
    wait_for(lambda: cluster.get(path).json().get("training_metrics"), "the first steps")
    said = len(cluster.output)
    killed = ("job_svc-2", "dataset_svc")
    for name in killed:
        cluster.child(name).send_signal(signal.SIGKILL)
    # Calls that change something go on as well, through whichever replica is there.
    assert cluster.tunery("datasets", "upload", str(rows_csv)).code == 0
    for name in killed:
        wait_for(lambda name=name: f"{name} is well again" in cluster.output[said:], f"{name}'s return")
    assert reader() == []
    followed = cluster.tunery("jobs", "logs", "-f", job["id"], "--json")
    assert followed.code == 0, followed
    records = followed.json["data"]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    details = cluster.tunery("jobs", "show", job["id"], "--json").json
    assert (details["job"]["status"], details["attempts"]) == ("completed", 1)
    assert details["job"]["training_metrics"]["steps_completed"] == 160
    model = details["job"]["fine_tuned_model"]
    asked = cluster.tunery("models", "ask", model, "What is 3 plus one?", "--json")
    assert asked.code == 0, asked


def test_a_request_is_followed_through_every_log(cluster: Up, job: dict[str, str]) -> None:
    def lines() -> dict[str, list[dict[str, str]]]:
        """What each service says of the request, and of what came of it."""
        found: dict[str, list[dict[str, str]]] = {}
        for path in sorted((cluster.data_dir / "logs").glob("*.log")):
            service = path.stem.partition("-")[0]
            for line in path.read_text().splitlines():
                if (
                    line.startswith("{")
                    and (record := json.loads(line)).get("request_id") == job["request_id"]
                ):
                    found.setdefault(service, []).append(record)
        return found

    assert job["request_id"]
    wait_for(lambda: "gateway" in lines(), "the gateway's log, which is written every second")
    wait_for(lambda: lines()["trainer_svc"][-1]["event"] == "attempt ended", "the trainer's last line")
    found = lines()
    assert [(line["method"], line["path"], line["status"]) for line in found["gateway"]] == [
        ("POST", JOBS, 201)
    ]
    assert {line["rpc"].rpartition("/")[2] for line in found["job_svc"] if "rpc" in line} == {
        "CreateJobFromJson"
    }
    assert {line["rpc"].rpartition("/")[2] for line in found["dataset_svc"]} >= {
        "HoldJobData",
        "PrepareJobData",
    }
    assert found["trainer_svc"][0]["event"] == "job leased"
    assert {line["job_id"] for line in found["trainer_svc"]} == {job["id"]}
    assert all(
        line["service"] == service for service in found if service != "gateway" for line in found[service]
    )


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        ("store=2", ["'store'", "dataset, job, trainer, inference"]),
        ("job", ["job="]),
        ("job=0", ["job=0", "from 1 to 64"]),
        ("job=-1", ["job=-1"]),
        ("trainer=65", ["trainer=65"]),
        ("trainer=two", ["trainer=two"]),
        ("trainer=2,trainer=3", ["trainer twice"]),
        (",", ["''"]),
        ("trainer=2,job=2", ["job=2", "PostgreSQL", "TUNERY_DATABASE_URL"]),
        ("dataset=2", ["dataset=2", "PostgreSQL"]),
        ("inference=2", ["inference=2", "PostgreSQL"]),
    ],
)
def test_what_replicas_can_not_be(
    tunery: Callable[..., Result], tmp_path: Path, replicas: str, words: list[str]
) -> None:
    result = tunery("up", "--data-dir", str(tmp_path / "data"), "--replicas", replicas)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result
    for word in words:
        assert word in result.err


@pytest.mark.parametrize("missing", ["TUNERY_TLS_CERT_FILE", "TUNERY_TLS_KEY_FILE", "TUNERY_TLS_CA_FILE"])
def test_a_part_of_tls_is_refused(
    tunery: Callable[..., Result], tmp_path: Path, authority: Authority, missing: str
) -> None:
    part = {name: file for name, file in variables(authority.issue("part")).items() if name != missing}
    result = tunery("up", "--data-dir", str(tmp_path / "data"), **part)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result
    assert f"{missing}" in result.err
    assert "set all three, or none" in result.err


def test_files_that_are_no_pair_are_refused(
    tunery: Callable[..., Result], tmp_path: Path, authority: Authority
) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    for wrong in (
        Tls(one.cert_file, other.key_file, one.ca_file),
        Tls(one.cert_file, one.key_file, one.key_file),
        Tls(tmp_path / "none.pem", one.key_file, one.ca_file),
    ):
        result = tunery("up", "--data-dir", str(tmp_path / "data"), **variables(wrong))
        assert (result.code, len(result.err.splitlines())) == (2, 1), result
        assert str(wrong.key_file) in result.err
