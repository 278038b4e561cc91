"""500 clients that go away, at every moment of their requests: nothing of them stays in the replica or in Serve's proxy.

What is compared is what a leak would show in: sequences, cache bytes, threads, descriptors; memory is printed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tc_ray.serving.deploy.launch import Server
from tests.support.serving_cluster import PROMPT, metric, replica_pids, server_of, soon
from tests.support.serving_samples import make_export

DISCONNECTS = 500
WARM_UP = 250
SLACK = 3
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    export = make_export(tmp_path_factory.mktemp("demo"), positions=4096)
    with server_of([export.parent], threads=1, max_tokens=4000, cache_bytes=2 * 10**8) as server:
        yield server


@dataclass
class Process:
    """What a process holds at a moment."""

    threads: int
    descriptors: int
    resident_mb: float
    names: Counter[str]

    @staticmethod
    def of(pid: int) -> Process:
        """Read it."""
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        names: Counter[str] = Counter()
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                names[(task / "comm").read_text().strip()] += 1
        return Process(int(fields["Threads"]), descriptors, int(fields["VmRSS"].split()[0]) / 1024, names)


def leave(server: Server, number: int) -> str:
    """One client that goes away: after some events, or when its patience is over, of a stream or not; returns how."""
    chance = random.Random(number)
    body = {
        "model": next(iter(server.settings.models)),
        "prompt": PROMPT,
        "max_tokens": 4000,
        "stream": number % 3 != 0,
    }
    patience_s = 30 if number % 3 == 1 else chance.uniform(0.02, 0.6)
    events = chance.randrange(1, 20)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(timeout=httpx.Timeout(30, read=patience_s)) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        if response.status_code != 200:
            return str(response.status_code)
        for _ in response.iter_lines():
            events -= 1
            if not events:
                return "in the stream"
    return "while it waited"


def leave_often(server: Server, numbers: range) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        ways = list(clients.map(lambda number: leave(server, number), numbers))
    told = {way: ways.count(way) for way in set(ways)}
    print(f"{len(ways)} clients left: {told}")
    assert set(told) <= {"in the stream", "while it waited"}
    assert min(told.values()) > len(ways) / 10


def held(server: Server) -> dict[str, float]:
    """What the engine holds, once it says that nothing runs."""
    states = ("tc_ray_running_sequences", "tc_ray_waiting_sequences", "tc_ray_cache_bytes")
    idle = lambda: all(metric(name) == 0 for name in states[:2])
    assert soon(idle, 10), "sequences of clients that left still run"
    return {name: metric(name) for name in states}


def test_500_disconnects_leave_nothing(server: Server) -> None:
    [replica], [proxy] = replica_pids(), replica_pids("ProxyActor")
    leave_often(server, range(WARM_UP))  # pools of threads and connections are as large as they get
    cache = held(server)
    time.sleep(2)
    before = {pid: Process.of(pid) for pid in (replica, proxy)}
    leave_often(server, range(WARM_UP, WARM_UP + DISCONNECTS))
    assert held(server) == cache
    # Connections and tasks end soon after their clients, not at once; a pool may have grown by a thread or two meanwhile.
    # What every hundredth client left behind would be more.
    quiet = lambda: all(
        Process.of(pid).threads <= one.threads + SLACK and Process.of(pid).descriptors <= one.descriptors + SLACK
        for pid, one in before.items()
    )
    settled = soon(quiet, 30)
    after = {pid: Process.of(pid) for pid in before}
    for pid, one in before.items():
        more = {name: count for name, count in (after[pid].names - one.names).items() if count}
        print(f"before {one}\nafter  {after[pid]}\nmore threads: {more}")
    assert settled, (before, after)
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
