"""Asks PyPI which of the pinned versions have known vulnerabilities; exits with 1 where one has.

    .venv/bin/python deploy/audit_pins.py [CONSTRAINTS] [--index URL]

pip-audit asks for `/pypi/NAME/VERSION/json`, which mirrors often don't carry. A project's own page, which
they do, tells the same of its newest version. A version that neither tells of is named as not audited; where
those are more than half, the audit fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from packaging.requirements import Requirement
from packaging.version import Version

_ROOT = Path(__file__).parents[1]
_CONNECTIONS = 8


@dataclass(frozen=True)
class Audited:
    """What PyPI says of a pinned version.

    Attributes:
        pin: such as `torch==2.13.0`.
        vulnerabilities: each with its id, its other names and the versions that mend it; None where PyPI
            says nothing of this version.
    """

    pin: str
    vulnerabilities: list[str] | None


def pins(constraints: Path) -> list[tuple[str, str]]:
    """Returns the names and versions of a file of lines `NAME==VERSION`.

    Raises:
        ValueError: a line pins no version.
    """
    found = []
    for line in constraints.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        versions = [part.version for part in requirement.specifier if part.operator == "=="]
        if len(versions) != 1:
            raise ValueError(f"{text!r} pins no version")
        found.append((requirement.name, versions[0]))
    return found


def audit(client: httpx.Client, name: str, version: str) -> Audited:
    """Asks about one pinned version.

    Args:
        client: of the index; its base URL is like `https://pypi.org`.
        name: the project.
        version: as it is pinned.

    Raises:
        httpx.HTTPError: the index can't be reached, or answers with an error that isn't 404.
    """
    pin = f"{name}=={version}"
    for page in (f"/pypi/{name}/{version}/json", f"/pypi/{name}/json"):
        response = client.get(page)
        if response.status_code == httpx.codes.NOT_FOUND:
            continue
        told = response.raise_for_status().json()
        if Version(told["info"]["version"]) == Version(version):
            return Audited(pin, list(_vulnerabilities(told["vulnerabilities"])))
    return Audited(pin, None)


def _vulnerabilities(told: list[dict[str, Any]]) -> Iterator[str]:
    for each in told:
        if not each["withdrawn"]:
            names = ", ".join([each["id"], *each["aliases"]])
            yield f"{names}; mended in {', '.join(each['fixed_in']) or 'no version yet'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("constraints", type=Path, nargs="?", default=_ROOT / "constraints.txt")
    parser.add_argument("--index", default="https://pypi.org")
    options = parser.parse_args()
    with (
        httpx.Client(base_url=options.index, timeout=30, follow_redirects=True) as client,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        try:
            results = list(pool.map(lambda pin: audit(client, *pin), pins(options.constraints)))
        except httpx.HTTPError as error:
            print(f"{options.index} can't be asked: {error}", file=sys.stderr)
            return 1
    for result in results:
        for vulnerability in result.vulnerabilities or ():
            print(f"{result.pin}: {vulnerability}")
    unknown = [result.pin for result in results if result.vulnerabilities is None]
    if unknown:
        print(f"not audited, since {options.index} tells nothing of them: {', '.join(unknown)}")
    num_vulnerable = sum(bool(result.vulnerabilities) for result in results)
    num_audited = len(results) - len(unknown)
    is_worth_something = 2 * num_audited >= len(results)
    print(f"{num_audited} of {len(results)} pinned versions audited, {num_vulnerable} vulnerable")
    return 0 if num_vulnerable == 0 and is_worth_something else 1


if __name__ == "__main__":
    sys.exit(main())
