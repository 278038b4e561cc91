"""Signals that ask a command to end: SIGTERM, SIGINT (also where a background shell has switched it off), SIGHUP.

Invariant: the first one raises `Stopped` in the main thread, so that a run can write its status and release its workers. A
later one ends the process at once. When Ray starts, it replaces these handlers by its own, one of which prints a C++ trace and
aborts, so `take_signals` is called again then. Called by `cli.command.run_command`, `cluster.session` and `run.job`.
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
"""A second signal within this time is the same request: `timeout` and job supervisors signal the process, then its group."""

_asked: list[tuple[int, float]] = []
"""Number and time of the first signal."""
_taken: list[dict[int, Any]] = []
"""Handlers that `stop_signals` replaced; empty outside of it."""
_timers: list[threading.Timer] = []


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end.

    A KeyboardInterrupt, because Ray's C++ passes nothing else on from a signal handler, and that only as a plain one: catch
    KeyboardInterrupt and convert it by `as_stopped`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.reported = False
        """Whether the user has been shown how to resume."""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """The exit code that shells and Kubernetes expect of a process that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """The signals raise `Stopped` inside it. Does nothing outside the main thread, since only that may have handlers."""
    if threading.current_thread() is not threading.main_thread() or _taken:
        yield
        return
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the command must outlive the terminal
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
    """Work that the same command resumes. If a signal ends it, one line says so before anything outside of it is closed."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        stop = as_stopped(interrupt)
        if not stop.reported:
            how = f"{stop}; the same command resumes from the last checkpoint in {folder}"
            print(visible(how), file=sys.stderr, flush=True)
        stop.reported = True
        raise stop from None


def as_stopped(interrupt: KeyboardInterrupt) -> Stopped:
    """The signal that caused an interrupt."""
    return interrupt if isinstance(interrupt, Stopped) else Stopped(_asked[0][0] if _asked else signal.SIGINT)


def end_within(seconds: float) -> None:
    """End a command that a signal has stopped after this time at most, with the signal's exit code, even if something hangs.

    A signal for a whole process group (`timeout`, systemd, Slurm) ends a local Ray too, and a call to that Ray then waits a
    minute and aborts with another code. Does nothing outside `stop_signals`.
    """
    if _taken and _asked:
        timer = threading.Timer(seconds, os._exit, (128 + _asked[0][0],))
        timer.daemon = True
        timer.start()
        _timers.append(timer)


def take_signals() -> None:
    """Set the handlers again if inside `stop_signals`."""
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
