"""What a part of a run takes: its time, and the peak memory of a process. Sent to the Tracker without waiting for an answer.

Used by the processes of a run; `tc-ray report` reads what they sent.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def peak_memory(name: str) -> dict[str, float]:
    """Bytes that this process has held at most, in RAM as `name` and, where it uses a GPU, there as `NAME gpu`."""
    found = {name: _peak_bytes()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found[f"{name} gpu"] = float(torch.cuda.max_memory_allocated())
    return found


def _peak_bytes() -> float:
    # not ru_maxrss, where there is another source: it survives exec, so it may be that of the process that started this one
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024.0 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextmanager
def timed(tracker: Any, part: str, *, enabled: bool = True) -> Iterator[None]:
    """Report the seconds of the block as those of a part of the run. enabled: False on all ranks but one."""
    began = time.monotonic()
    yield
    if enabled:
        tracker.spent.remote({part: time.monotonic() - began})
