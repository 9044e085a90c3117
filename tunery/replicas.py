"""How many processes each service has, as `--replicas` says it."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.errors import SetUpError

SERVICES = {
    "dataset": "dataset_svc",
    "job": "job_svc",
    "trainer": "trainer_svc",
    "inference": "inference_svc",
}
# A trainer's jobs come from job_svc alone, so that any number can be there whatever the database is.
_ON_ANY_DATABASE = "trainer"
_NUMBERS = range(1, 65)


def parse_replicas(text: str, database_url: str) -> Mapping[str, int]:
    """Reads `dataset=2,job=3`; returns numbers of processes by services' full names, those named only.

    Args:
        text: what `--replicas` was given; may be empty.
        database_url: the operator's; empty where every service has an SQLite file of its own.

    Raises:
        SetUpError: it names something else, or several processes for a file of SQLite.
    """
    replicas: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in SERVICES:
            raise SetUpError(f"--replicas: {name!r} is no service; they are {', '.join(SERVICES)}")
        if SERVICES[name] in replicas:
            raise SetUpError(f"--replicas names {name} twice")
        if not number.isdecimal() or int(number) not in _NUMBERS:
            raise SetUpError(
                f"--replicas: {name}={number} is no number from {_NUMBERS[0]} to {_NUMBERS[-1]}; "
                f"write it as {name}=2"
            )
        replicas[SERVICES[name]] = int(number)
        if int(number) > 1 and name != _ON_ANY_DATABASE and not database_url.startswith("postgresql"):
            raise SetUpError(
                f"--replicas {name}={number} needs PostgreSQL, since an SQLite file is for one process of a "
                "service; set TUNERY_DATABASE_URL=postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or have "
                f"several of {_ON_ANY_DATABASE} only"
            )
    return replicas
