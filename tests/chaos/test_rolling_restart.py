"""Services restarted one after another under traffic: no client notices."""

from __future__ import annotations

from tests.chaos.rolling_restart import restart_under_traffic
from tests.chaos.stack import ChaosStack

# All but the gateway, without which nothing can be asked.
SERVICES = ("dataset_svc", "job_svc", "authz", "trainer_svc", "inference_svc")


def test_no_request_fails(chaos: ChaosStack) -> None:
    for kind, traffic in restart_under_traffic(chaos, SERVICES).items():
        assert traffic.num_requests > 0
        told = f"{len(traffic.failures)} of {traffic.num_requests} {kind}: {traffic.failures}"
        assert not traffic.failures, told
