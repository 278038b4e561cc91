"""Turns on what several engines share: the processor, and the Pilot while two Copilots of it are loaded."""

from __future__ import annotations

import threading


class Turns:
    """A lock that is given in the order in which it was asked for, so that no engine starves another. `with turns: ...`"""

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
