"""A server on a real local Ray Serve, clients that stream from it, and a look into its replicas' processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from tc_ray.serving.deploy.launch import (
    APPLICATION,
    FAILOVER_PROXY,
    NICENESS_VARIABLE,
    PROXY_CALLBACK_VARIABLE,
    Server,
    start_server,
)
from tc_ray.serving.deploy.settings import command_settings
from tests.support.ports import free_port

PROMPT = "Tom has 3 apples"
_metrics_port = 0


@contextlib.contextmanager
def local_ray(cpus: int = 2) -> Iterator[None]:
    """A Ray of its own, whose HTTP proxies have the failover proxy."""
    before = os.environ.get(PROXY_CALLBACK_VARIABLE)
    os.environ[PROXY_CALLBACK_VARIABLE] = FAILOVER_PROXY
    os.environ.setdefault(NICENESS_VARIABLE, "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine takes longer than Ray's 30 s
    global _metrics_port
    _metrics_port = free_port()
    fast = {"metrics_report_interval_ms": 500}
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, _metrics_export_port=_metrics_port, _system_config=fast
    )
    try:
        yield
    finally:
        ray.shutdown()
        if before is None:
            del os.environ[PROXY_CALLBACK_VARIABLE]
        else:
            os.environ[PROXY_CALLBACK_VARIABLE] = before


@contextlib.contextmanager
def server_of(folders: Sequence[Path | str], **fields: Any) -> Iterator[Server]:
    """A server on a Ray of its own, ended at once afterwards. fields: of the `serving` section."""
    overrides = [f"serving.{name}={value}" for name, value in {"port": free_port(), **fields}.items()]
    with local_ray():
        server = start_server(command_settings([*map(str, folders), *overrides]))
        yield server
        server.stop(drain_s=0)


class Stream(threading.Thread):
    """A client that streams one completion. text: what came. end: `[DONE]`, an error's code, or `cut`."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, {**body, "stream": True}
        self.text, self.end, self.status = "", "not begun", 0
        self.begun, self.seconds = threading.Event(), 0.0

    def run(self) -> None:
        """Read the stream to its end."""
        since = time.monotonic()
        try:
            with (
                httpx.Client(timeout=300) as client,
                client.stream("POST", f"{self._url}/v1/completions", json=self._body) as response,
            ):
                self.status, self.end = response.status_code, "cut"
                if self.status != 200:
                    self.end = str(json.loads(response.read())["error"]["code"])
                    return
                # not iter_lines, which also ends lines at characters that a text may hold
                rest = b""
                for block in response.iter_raw():
                    *lines, rest = (rest + block).split(b"\n")
                    for line in lines:
                        self._take(line.decode())
        except httpx.HTTPError as error:
            self.end = f"cut: {type(error).__name__}"
        finally:
            self.begun.set()
            self.seconds = time.monotonic() - since

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.end = "[DONE]"
        elif line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.end = str(event["error"]["code"])
                return
            self.text += "".join(choice["text"] for choice in event["choices"])
            self.begun.set()


def replica_pids(name: str = "ServeReplica:tc-ray:FusedModel") -> list[int]:
    """Processes of the replicas that run now, by the title that Ray gives them; other Rays of the machine are not ours."""
    found = []
    for pid in processes_under(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").startswith(f"ray::{name}"):
                found.append(pid)
    return sorted(found)


def processes_under(ancestor: int) -> dict[int, int]:
    """The processes that descend from one, and when each began, for their numbers are used again."""
    stats = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                stats[int(folder.name)] = _stat(int(folder.name))

    def descends(pid: int) -> bool:
        while pid in stats:
            pid = int(stats[pid][1])
            if pid == ancestor:
                return True
        return False

    return {pid: int(stat[19]) for pid, stat in stats.items() if descends(pid)}


def runs(pid: int, begun: int) -> bool:
    """Whether a process that began then has not ended yet; one that only waits for its parent to take note has."""
    with contextlib.suppress(OSError):
        stat = _stat(pid)
        return int(stat[19]) == begun and stat[0] not in "ZX"
    return False


def _stat(pid: int) -> list[str]:
    """State, parent and so on, from /proc, after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def prometheus() -> str:
    """All metrics of the Ray of `local_ray`, as Prometheus scrapes them."""
    return httpx.get(f"http://127.0.0.1:{_metrics_port}/metrics", timeout=30).text


def metric(name: str) -> float:
    """Sum of the samples of one metric of the server, NaN before the first; they are up to 1.5 s old."""
    lines = [line for line in prometheus().splitlines() if line.startswith(f"ray_{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else math.nan


def running_replicas() -> int:
    """Replicas that Serve sends requests to."""
    [deployment] = serve.status().applications[APPLICATION].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def soon(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes true within so many seconds."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
