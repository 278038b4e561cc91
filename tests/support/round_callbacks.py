"""Callbacks of a run (`callbacks.on_round`), called in the Pilot's first worker."""

from __future__ import annotations

import time
from typing import Any


def slowly(number: int, metrics: dict[str, Any]) -> None:
    """At most ten rounds a second."""
    time.sleep(0.1)
