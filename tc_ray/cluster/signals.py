"""Signals that ask a command to end: SIGTERM, SIGINT (also where a background shell has switched it off), SIGHUP.

Invariant: the first one raises `Stopped` in the main thread, so that a run can write its status and give its workers back; a
later one ends the process at once. Ray puts handlers of its own in place of these when it starts, one of which prints a trace
of C++ and aborts: `take_signals` is called again after that. Imports nothing of the package. Called by `cli.errors.run_command`
and `session`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tc_ray.text import visible

TWICE_SECONDS = 1.0
"""One request can come twice: `timeout` and job supervisors signal the process and then its group."""

_asked: list[tuple[int, float]] = []
"""Number and time of the first signal."""
_taken: list[dict[int, Any]] = []
"""Handlers before `stop_signals`; empty outside of it."""
_timers: list[threading.Timer] = []


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end.

    A KeyboardInterrupt, because Ray's C++ lets nothing else of a signal handler through, and that as a plain one: catch
    KeyboardInterrupt, and make this of it by `as_stopped`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.reported = False
        """Whether the user has read how to go on."""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """What shells and Kubernetes know a process by that a signal has ended."""
        return 128 + self.number


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within it the signals raise `Stopped`. Does nothing outside the main thread, which alone may have handlers."""
    if threading.current_thread() is not threading.main_thread() or _taken:
        yield
        return
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to outlive the terminal
        wanted.append(signal.SIGHUP)
    _taken.append({number: signal.getsignal(number) for number in wanted})
    _asked.clear()
    take_signals()
    try:
        yield
    finally:
        for timer in _timers:
            timer.cancel()
        _timers.clear()
        for number, handler in _taken.pop().items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Work that the same command goes on with: where a signal ends it, one line says so, before anything outside of it is closed."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        stop = as_stopped(interrupt)
        if not stop.reported:
            how = f"{stop}; the same command goes on from the last checkpoint in {folder}"
            print(visible(how), file=sys.stderr, flush=True)
        stop.reported = True
        raise stop from None


def as_stopped(interrupt: KeyboardInterrupt) -> Stopped:
    """The signal that an interrupt came of."""
    return interrupt if isinstance(interrupt, Stopped) else Stopped(_asked[0][0] if _asked else signal.SIGINT)


def end_within(seconds: float) -> None:
    """A command that was asked to end, and has written what it must, ends by then with the signal's code, whatever hangs.

    A signal for a whole process group (`timeout`, systemd, Slurm) ends a local Ray too, and what asks that Ray waits a minute and
    aborts with another code. Does nothing outside `stop_signals`.
    """
    if _taken and _asked:
        timer = threading.Timer(seconds, os._exit, (128 + _asked[0][0],))
        timer.daemon = True
        timer.start()
        _timers.append(timer)


def take_signals() -> None:
    """Put the handlers in place again, within `stop_signals`; else nothing."""
    if _taken and threading.current_thread() is threading.main_thread():
        for number in _taken[-1]:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    if not _asked:
        _asked.append((number, time.monotonic()))
        raise Stopped(number)
    if time.monotonic() - _asked[0][1] > TWICE_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
