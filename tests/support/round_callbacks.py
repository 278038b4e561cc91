"""Callbacks of a run (`callbacks.on_round`), called in the Pilot's first worker: they kill it, or make rounds last longer."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def after_round_3(number: int, metrics: dict[str, Any]) -> None:
    """SIGKILL to this process after round 3."""
    _die(number, 3)


def after_round_6(number: int, metrics: dict[str, Any]) -> None:
    """SIGKILL to this process after round 6."""
    _die(number, 6)


def slowly(number: int, metrics: dict[str, Any]) -> None:
    """At most ten rounds a second."""
    time.sleep(0.1)


def _die(number: int, last: int) -> None:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
