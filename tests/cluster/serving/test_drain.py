"""`tc-ray serve` and SIGTERM: requests in progress are finished, then it ends and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.ports import free_port
from tests.support.serving_cluster import PROMPT, Stream, processes_under, runs, soon
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[3]
TOKENS = 1200
"""They take some seconds."""
START_S = 150.0
END_S = 60.0


@contextlib.contextmanager
def command(export: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real command with a Ray of its own, once it answers; what it prints is in `log`."""
    fields = {"port": port, "threads": 1, "max_tokens": TOKENS, "cache_bytes": 2 * 10**8}
    given = [f"serving.{name}={value}" for name, value in fields.items()]
    # a busy machine takes longer than Ray's 30 s to start
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "120"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tc_ray.cli.main", "serve", f"demo={export}", *given],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    started: dict[int, int] = {}
    try:
        ready = soon(lambda: process.poll() is not None or "ready: demo at" in log.read_text(), START_S)
        started = processes_under(process.pid)
        assert ready and process.poll() is None, log.read_text()
        yield process
    finally:
        started |= processes_under(process.pid)
        if process.poll() is None:
            process.kill()
        process.wait(30)
        for pid in filter(lambda pid: runs(pid, started[pid]), started):  # only where the test has failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def title(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses on which these processes accept TCP connections."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(pid).net_connections(kind="tcp")
            found |= {one.laddr.ip.removeprefix("::ffff:") for one in connections if one.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.timeout(400)
def test_sigterm_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    export, port, log = make_export(tmp_path / "demo", positions=TOKENS + 100), free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    with command(export, port, log) as process:
        expected = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
        stream = Stream(url, body)
        stream.start()
        assert stream.begun.wait(60)
        started = processes_under(process.pid)
        assert len(started) > 3, "Ray's processes, the proxy and the replica"
        # a replica's gRPC port is on all interfaces: Serve has no setting for it
        others = [pid for pid in started if not title(pid).startswith("ray::ServeReplica")]
        assert len(others) < len(started)
        assert listening(others) == {"127.0.0.1"}, "Ray's own ports are those of the server's address too"
        said = len(stream.text)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert said < len(expected) / 2, "the signal came too late to tell"
        stream.join(120)
        drained_s = time.monotonic() - told
        assert (stream.status, stream.end) == (200, "[DONE]"), log.read_text()
        assert stream.text == expected
        assert process.wait(END_S) == 0, log.read_text()
        print(f"the stream went on for {drained_s:.1f} s; ended {time.monotonic() - told:.1f} s after the signal")
        assert "finishing requests in progress" in log.read_text()
        assert soon(lambda: not any(runs(pid, begun) for pid, begun in started.items()), 20)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=5)
