"""Uploads 1 GiB of CSV through the whole stack: megabytes a second, and how much each process grows.

    .venv/bin/python bench/upload_throughput.py [--gib 1.0] [--rounds 3] [--json]

The claim: at least 60 MB/s on 2 cores, and no process grows by more than 300 MB, whatever the size.
Prints a table, and writes `bench/results/upload_throughput.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from kept_results import keep
from stacks import WholeStack, whole_stack

BOUNDARY = "tunery-bench-boundary"
BLOCK_BYTES = 1024 * 1024
POLL_SECONDS = 0.05
MB = 1e6


def csv_block() -> bytes:
    """About 1 MiB of rows like GSM8K's: two quoted columns, newlines in the second, 500 bytes a row."""
    rows, size = [], 0
    while size < BLOCK_BYTES:
        number = len(rows)
        question = f"Row {number}: a shop has {number} boxes with 12 pens each, and sells a third. " * 3
        answer = f'There are {number} * 12 pens.\nA third is sold, he said ""quickly"".\n#### {number * 8}'
        rows.append(f'"{question.strip()}","{answer}"\n'.encode())
        size += len(rows[-1])
    return b"".join(rows)


def body(num_bytes: int, block: bytes) -> Iterator[bytes]:
    """A multipart body whose file has about `num_bytes`."""
    disposition = 'Content-Disposition: form-data; name="file"; filename="bench.csv"'
    yield f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: text/csv\r\n\r\nquestion,answer\n".encode()
    for _ in range(num_bytes // len(block)):
        yield block
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


class MemoryWatch(threading.Thread):
    """Notes the highest resident memory of a process and its descendants, by name, in bytes."""

    def __init__(self, root: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._done = threading.Event()
        self.at_start = self._measure()
        self.highest = dict(self.at_start)

    def _measure(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                found[_name(process)] = process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found

    def run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            for name, rss in self._measure().items():
                self.highest[name] = max(rss, self.highest.get(name, 0))

    def stop(self) -> dict[str, int]:
        """Ends the watch and returns each process's growth."""
        self._done.set()
        self.join()
        return {name: rss - self.at_start.get(name, rss) for name, rss in self.highest.items()}


def _name(process: psutil.Process) -> str:
    line = process.cmdline()
    if "-m" in line:
        return line[line.index("-m") + 1]
    return Path(line[0]).name if line else process.name()


def upload(stack: WholeStack, num_bytes: int, block: bytes) -> tuple[float, int]:
    """Uploads once; returns the seconds it took and the size that the service reports, in bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=600)
    headers = {
        "Authorization": f"Bearer {stack.api_key}",
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        "Transfer-Encoding": "chunked",
    }
    start = time.perf_counter()
    connection.request(
        "POST", "/api/v1/fine-tuning/datasets", body(num_bytes, block), headers, encode_chunked=True
    )
    response = connection.getresponse()
    answer = json.loads(response.read())
    seconds = time.perf_counter() - start
    connection.close()
    assert response.status == 201, answer
    return seconds, int(answer["size_bytes"])


def measure(num_bytes: int, rounds: int) -> dict[str, object]:
    """Runs a stack of its own and uploads `rounds` times."""
    block = csv_block()
    with whole_stack(TUNERY_MAX_UPLOAD_BYTES=str(2 * num_bytes)) as stack:
        upload(stack, 16 * BLOCK_BYTES, block)  # everything is imported and connected after it
        watch = MemoryWatch(stack.process)
        watch.start()
        speeds = []
        for _ in range(rounds):
            seconds, size_bytes = upload(stack, num_bytes, block)
            speeds.append(size_bytes / MB / seconds)
        growth = watch.stop()
    return {
        "size_mb": round(size_bytes / MB),
        "mb_per_second": [round(speed, 1) for speed in speeds],
        "growth_mb": {name: round(grown / MB, 1) for name, grown in sorted(growth.items())},
    }


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = measure(int(options.gib * 2**30), options.rounds)
    result = keep("upload_throughput", result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['size_mb']} MB, MB/s of each round: {result['mb_per_second']}")
    for name, grown in result["growth_mb"].items():  # type: ignore[union-attr]  # a dict, as made above
        print(f"  {name:32} grew by {grown:8.1f} MB")


if __name__ == "__main__":
    main()
