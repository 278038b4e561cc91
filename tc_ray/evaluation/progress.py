"""The progress of an evaluation: a bar on a terminal, plain lines elsewhere, or a run's Tracker.

Invariant: while rows get done, something is said every few seconds: what is computed, for which model and set, rows of all.
Called by `pool` about once a second and at every batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tc_ray.text import visible

LINE_SECONDS = 5.0
"""Between two plain lines of one pass, and between two texts to a Tracker."""
STILL_SECONDS = 10.0
"""As long again before a line that has nothing new."""
_BAR = 24


class Progress:
    """Shows lines on a console. It is a context manager: the bar leaves the terminal at its end."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown: tuple[str, int] = ("", -1)
        self._due = 0.0

    def __enter__(self) -> Progress:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` rows of a pass. A pass that is complete is said at once, the rest as often as it is of use."""
        complete, new = done == total, what != self._shown[0]
        if (what, done) == self._shown and (complete or time.monotonic() < self._due):
            return
        if self._console.is_terminal:
            if not complete:
                full = _BAR * done // max(1, total)
                bar = f"evaluate: {what} [{'#' * full}{'.' * (_BAR - full)}] {done} of {total} rows"
                self._live.start()
                self._live.update(Text(visible(bar)), refresh=True)
                return
        elif not (complete or new or time.monotonic() >= self._due + (done == self._shown[1]) * STILL_SECONDS):
            return
        self._shown, self._due = (what, done), time.monotonic() + LINE_SECONDS
        self._line(f"evaluate: {what}: {done} of {total} rows", complete)

    def note(self, text: str) -> None:
        """Say something once."""
        self._line(f"evaluate: {text}", True)

    def memory(self, peaks: Mapping[str, float]) -> None:
        """Peak memory of workers by name, in bytes; for a Tracker."""

    def _line(self, text: str, last: bool) -> None:
        """last: nothing more follows on this pass."""
        self._console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


class TrackedProgress(Progress):
    """For a run's Tracker: what goes on is its waiting text, a pass that is complete an event."""

    def __init__(self, tracker: Any) -> None:
        super().__init__(Console(quiet=True, force_terminal=False))
        self._tracker = tracker

    def __exit__(self, *_: object) -> None:
        self._tracker.waiting.remote("evaluation", "")

    def memory(self, peaks: Mapping[str, float]) -> None:
        self._tracker.memory.remote(peaks)

    def _line(self, text: str, last: bool) -> None:
        text = text.removeprefix("evaluate: ")
        if last:
            self._tracker.event.remote("evaluate", text)
        else:
            self._tracker.waiting.remote("evaluation", text)
