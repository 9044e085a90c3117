"""Tells by its exit code whether a gRPC server is well: `check_health.py HOST:PORT`. For containers.

Where the service's environment names files for TLS, they are used, and the certificate must be good for HOST.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from svc_kit.tls import Tls

ANSWER_SECONDS = 4


def connect(address: str) -> grpc.Channel:
    """Returns a channel, with TLS where the environment has it."""
    options = [("grpc.enable_http_proxy", 0)]
    if "TUNERY_TLS_CERT_FILE" not in os.environ:
        return grpc.insecure_channel(address, options)
    cert, key, ca = (Path(os.environ[f"TUNERY_TLS_{name}_FILE"]) for name in ("CERT", "KEY", "CA"))
    return grpc.secure_channel(address, Tls(cert, key, ca).channel_credentials(), options)


def main() -> int:
    """Returns 0 when the server says that it serves."""
    with connect(sys.argv[1]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS
            )
        except grpc.RpcError as error:
            print(error.code(), error.details(), file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
