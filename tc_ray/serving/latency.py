"""What keeps an event loop prompt in a process that has more to do: replicas, and Serve's proxy.

Invariant: nothing here changes what is computed. Called once in a process, when its modules are imported and before it serves.
"""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""The interpreter's lock changes hands after so long, not after 5 ms: a request passes through the event loops a dozen times, and
each time would wait that long for another thread (the engine's; Serve's router)."""


def prepare_process() -> None:
    """Shorten the turns of threads, and take what is there now from the garbage collector.

    Modules stay for good, and looking through those of Ray or torch stops every thread for 50 to 150 ms, every few seconds under
    load. What is made later, models too, is collected as ever.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
