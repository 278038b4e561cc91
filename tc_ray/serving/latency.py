"""Short pauses of the event loop in processes that do more than answer: replicas, and Serve's proxy.

Invariant: nothing here changes what is computed. Called once per process, after its imports and before it serves.
"""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""The interpreter's lock changes hands after so long, not after 5 ms: a request passes through the event loops a dozen
times, and each time would wait that long for another thread (the engine's, or Serve's router)."""


def prepare_process() -> None:
    """Shorten the turns of threads, and exempt all present objects from the garbage collector.

    Modules are never freed, and scanning those of Ray or torch stops every thread for 50 to 150 ms, every few seconds under
    load. Objects that are made later, models too, are collected as usual.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
