"""On a service's PYTHONPATH, has it start again with libfaketime.

The environment of `tunery up` can't have it loaded: Envoy hangs with it.
"""

import os
import sys

SERVICES = ("dataset_svc", "job_svc", "gateway.authz", "trainer_svc", "inference_svc")

if sys.orig_argv[-1] in SERVICES and "LD_PRELOAD" not in os.environ:
    os.environ["LD_PRELOAD"] = os.environ["FAKETIME_LIBRARY"]
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  # no shell is the point
