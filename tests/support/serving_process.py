"""A server in a process of its own: the app over the tiny export, on a free port of 127.0.0.1, by uvicorn.

Run as a module it is the server; `ServingProcess` starts it, waits until it answers, and reads its memory.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
TRIES = 5
Answer = TypeVar("Answer")


class ServingProcess:
    """`export` served as model `demo`. key: the API key it asks for; max_tokens, max_body_bytes: its limits."""

    def __init__(
        self,
        export: Path,
        *,
        key: str | None = None,
        max_tokens: int = 64,
        max_body_bytes: int = 2**20,
        seconds: float = 120,
    ) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tests.support.serving_process", str(export), str(listener.fileno())]
        command += ["--max-tokens", str(max_tokens), "--max-body-bytes", str(max_body_bytes)]
        command += ["--key", key] if key else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with listener:
            self.process = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=ROOT, env=environment)
        try:
            self._wait(seconds)
        except BaseException:
            self.stop()
            raise

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, "the server has ended"
            try:
                with urlopen(f"{self.address}/health", timeout=10):
                    return
            except (URLError, OSError):
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.1)

    def __enter__(self) -> ServingProcess:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    def cpu_s(self) -> float:
        """Time that the server's threads have been on a CPU, in seconds, to the microsecond."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text(encoding="utf-8").split()[0]) for task in tasks) / 1e9

    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory of the server now, and its peak since the last call of `forget_peak`."""
        return memory_bytes(self.process.pid)

    def forget_peak(self) -> None:
        """Begin a new peak."""
        forget_peak(self.process.pid)


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of a process now, and its peak since the last call of `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak(pid: int) -> None:
    """Begin a new peak."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")


def timed(
    server: ServingProcess, ask: Callable[[], tuple[Answer, float]], limit_s: float
) -> tuple[Answer, float, list[float]]:
    """An answer, the seconds that count for it, and those of all tries; `ask` gives an answer and how long it took.

    An answer later than `limit_s` is asked for again, for other processes of a busy machine can hold it up. Where they hold up
    all TRIES of them, the time counts that the server itself was on a CPU, which nothing but the server makes longer.
    """
    tries, cpu = [], []
    for _ in range(TRIES):
        begun = server.cpu_s()
        answer, seconds = ask()
        tries.append(seconds)
        cpu.append(server.cpu_s() - begun)
        if seconds < limit_s:
            return answer, seconds, tries
    return answer, min(cpu), tries


def serve(export: Path, descriptor: int, *, key: str | None, max_tokens: int, max_body_bytes: int) -> None:
    """Serve until it is stopped, on the listening socket `descriptor`."""
    import torch
    import uvicorn
    from starlette.responses import PlainTextResponse
    from transformers import AutoTokenizer

    from tc_ray.config.serving import ServingSection
    from tc_ray.models.fusion import FusedModel
    from tc_ray.serving.deploy.settings import digest
    from tc_ray.serving.engine.engine import Engine
    from tc_ray.serving.http.app import create_app
    from tc_ray.serving.models.registry import ModelRegistry, ServedModel
    from tc_ray.serving.text.prompt import PromptEncoder

    torch.set_num_threads(1)
    model = FusedModel.from_pretrained(export)
    tokenizer = [AutoTokenizer.from_pretrained(export / "pilot") for _ in range(2)]
    encoder = PromptEncoder(tokenizer[0], model.config.vocab_size)
    # kept prompts may fill what they are given, 256 MiB by default: here, where memory is watched, little
    section = ServingSection(prefix_bytes=2**22, max_tokens=max_tokens, max_body_bytes=max_body_bytes, threads=1)
    engine = Engine(model, tokenizer[1], section)
    served = ServedModel("demo", engine, encoder, model.default_lam)
    app = create_app(ModelRegistry([served]), section, (digest(key),) if key else ())
    app.add_route("/running", lambda _: PlainTextResponse(str(engine.load().running)))
    with socket.socket(fileno=descriptor) as listener:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--key")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--max-body-bytes", type=int, required=True)
    given = parser.parse_args()
    serve(
        given.export, given.descriptor, key=given.key, max_tokens=given.max_tokens, max_body_bytes=given.max_body_bytes
    )
