"""The events that a run's status shows.

Invariant: other events never push out restarts, and an event that repeats is shown once, with its count. metrics.jsonl has the
whole list, repetitions too. Used by `tracker.Tracker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

RESTART = "restart"
"""Kind of the events that are counted as restarts."""
EVENTS_SHOWN = 20
"""Restarts, and other events, that are kept: this many of each."""

Event = dict[str, Any]
"""`time` (unix seconds, of the first one), `kind`, `text`, and `count` if there were several."""


class Events:
    """The newest restarts and the newest other events.

    Args:
        before: events of an earlier start, oldest first.
    """

    def __init__(self, before: Iterable[Event] = ()) -> None:
        self._restarts: deque[Event] = deque(maxlen=EVENTS_SHOWN)
        self._others: deque[Event] = deque(maxlen=EVENTS_SHOWN)
        for event in before:
            (self._restarts if event["kind"] == RESTART else self._others).append(event)

    def add(self, time: float, kind: str, text: str) -> None:
        """Add an event, or raise the count of one with the same kind and text (except restarts)."""
        if kind == RESTART:
            self._restarts.append({"time": time, "kind": kind, "text": text})
            return
        for event in self._others:
            if (event["kind"], event["text"]) == (kind, text):
                event["count"] = event.get("count", 1) + 1
                return
        self._others.append({"time": time, "kind": kind, "text": text})

    def shown(self) -> list[Event]:
        """Copies of all, oldest first."""
        return sorted(map(dict, (*self._restarts, *self._others)), key=lambda event: event["time"])


def newest(events: list[Event], limit: int) -> list[Event]:
    """The last `limit` events, always with the last restart."""
    chosen = events[-limit:]
    restart = next((event for event in reversed(events) if event["kind"] == RESTART), None)
    return chosen if restart is None or restart in chosen else [restart, *chosen[1:]]


def described(event: Event) -> str:
    """Text of an event with its count."""
    return f"{event['text']} ({event['count']} times)" if event.get("count", 1) > 1 else str(event["text"])
