"""`make audit` against an index of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "audit_pins.py"
HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fixed_in": ["1.1"], "withdrawn": None}


def page(version: str, *vulnerabilities: dict[str, Any]) -> dict[str, Any]:
    return {"info": {"version": version}, "vulnerabilities": list(vulnerabilities)}


@contextmanager
def index(pages: dict[str, dict[str, Any]]) -> Iterator[str]:
    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = pages.get(self.path)
            body = json.dumps(found).encode() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def audit(folder: Path, url: str, constraints: str) -> subprocess.CompletedProcess[str]:
    (folder / "constraints.txt").write_text(constraints)
    command = [sys.executable, str(SCRIPT), str(folder / "constraints.txt"), "--index", url]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", ["/pypi/holed/1.0/json", "/pypi/holed/json"])
def test_a_vulnerable_version_fails_whichever_page_tells_of_it(tmp_path: Path, path: str) -> None:
    with index({path: page("1.0", HOLE), "/pypi/sound/2.0/json": page("2.0")}) as url:
        done = audit(tmp_path, url, "# ours\nholed==1.0  # why\nsound==2.0\n")
    assert done.returncode == 1, done
    assert "holed==1.0: PYSEC-1, CVE-1; mended in 1.1" in done.stdout
    assert "2 of 2 pinned versions audited, 1 vulnerable" in done.stdout


def test_what_was_withdrawn_is_no_vulnerability(tmp_path: Path) -> None:
    with index({"/pypi/sound/1.0/json": page("1.0", HOLE | {"withdrawn": "2026-01-01T00:00:00Z"})}) as url:
        done = audit(tmp_path, url, "sound==1.0\n")
    assert done.returncode == 0, done
    assert "1 of 1 pinned versions audited, 0 vulnerable" in done.stdout


def test_what_another_version_has_is_not_said_of_the_pinned_one(tmp_path: Path) -> None:
    pages = {"/pypi/old/json": page("9.0", HOLE), "/pypi/sound/json": page("2.0")}
    with index(pages) as url:
        done = audit(tmp_path, url, "old==1.0\nsound==2.0\n")
    assert done.returncode == 0, done
    assert "tells nothing of them: old==1.0" in done.stdout
    assert "1 of 2 pinned versions audited, 0 vulnerable" in done.stdout


def test_an_audit_of_less_than_half_fails(tmp_path: Path) -> None:
    with index({"/pypi/sound/json": page("2.0")}) as url:
        assert audit(tmp_path, url, "sound==2.0\nold==1.0\n").returncode == 0
        assert audit(tmp_path, url, "sound==2.0\nold==1.0\nolder==1.0\n").returncode == 1
    gone = audit(tmp_path, url, "old==1.0\n")
    assert gone.returncode == 1
    assert "can't be asked" in gone.stderr
