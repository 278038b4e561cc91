"""Turns of several engines on what they share: the processor, and a Pilot for which two Copilots are loaded."""

from __future__ import annotations

import threading


class Turns:
    """A fair lock: engines get it in the order in which they asked, so none starves another. `with turns: ...`"""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._now = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._next = self._next, self._next + 1
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()
