"""Which process holds something, so that another one can tell whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from later ones with the same number."""

    host: str
    pid: int
    boot: str
    """Of the machine since its last start and the process-number space (a container has its own); empty: not known."""
    born: str
    """When the process started, in the machine's own clock ticks; empty: not known."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> ProcessId:
        """Inverse of `to_dict`; other keys are ignored."""
        return cls(told["host"], told["pid"], told["boot"], told["born"])


def this_process() -> ProcessId:
    """The running process."""
    return ProcessId(socket.gethostname(), os.getpid(), _boot(), _born(os.getpid()))


def is_running(process: ProcessId) -> bool | None:
    """True or False where this machine can tell; None: it lives elsewhere."""
    if not process.boot or process.boot != _boot():
        return None
    return bool(process.born) and _born(process.pid) == process.born


def _boot() -> str:
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only the time of the last sign of life tells
        return ""


def _born(pid: int) -> str:
    """Start time of a process; empty when there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
