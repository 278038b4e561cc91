"""The thread in front of TensorBoard or Weights & Biases: each second it hands on what metrics.jsonl has gained.

Invariant: nobody waits for it, and its errors are counted and the first is reported. What a tracker does not take is tried again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from tc_ray.config.redact import redact
from tc_ray.text import first_line
from tc_ray.tracking.points import read_lines
from tc_ray.tracking.targets import Target

SEND_SECONDS = 1.0


class Follower:
    """Args:
    name: of the tracker, for messages.
    open: opens it; called in the thread, again after an error.
    points: the run's metrics.jsonl.
    on_error: called from the thread with one line when the tracker fails for the first time.
    """

    def __init__(self, name: str, open: Callable[[], Target], points: Path, on_error: Callable[[str], None]) -> None:
        self.name, self.errors = name, 0
        self._open, self._points, self._on_error = open, points, on_error
        self._target: Target | None = None
        self._read = self._lines = 0
        """Bytes and lines of the file that the tracker has."""
        self._end, self._complete, self._is_complete = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name=f"{name}-follower", daemon=True)
        self._thread.start()

    def finish(self, complete: bool, timeout_s: float) -> bool:
        """Send the rest, close the tracker, stop the thread. False: not done within timeout_s, or the tracker fails."""
        self._complete = complete
        self._end.set()
        self._thread.join(timeout_s)
        return self._is_complete

    def _work(self) -> None:
        ending = False
        while not ending:
            ending = self._end.wait(SEND_SECONDS)
            try:
                self._send()
                if ending and self._target is not None:
                    self._target.close(self._complete)
                    self._is_complete = True
            except Exception as error:  # noqa: BLE001 - tracking must not end a run, whatever a tracker raises
                self.errors += 1
                if self.errors == 1:
                    self._on_error(f"{self.name} fails, the run continues and tries again: {redact(first_line(error))}")

    def _send(self) -> None:
        if self._target is None:
            self._target = self._open()
        for end, point in read_lines(self._points, self._read):
            if point is not None:
                self._target.add(self._lines + 1, point)
            self._read, self._lines = end, self._lines + 1
