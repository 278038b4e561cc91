"""Calls the user's functions at their moments (`callbacks` of the config). Called by the loop and by `run.evaluate`.

Invariant: an error of a callback ends nothing: it becomes an event, which status and progress show, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tc_ray.config.named import load_named
from tc_ray.config.schema import CallbacksSection
from tc_ray.text import first_line


def call_back(settings: CallbacksSection, moment: str, *arguments: Any, report: Callable[[str, str], Any]) -> None:
    """Call the function of a moment (`on_round`, ...), if there is one. report: gets the event (kind, text) of its error."""
    name: str | None = getattr(settings, moment)
    if name is None:
        return
    try:
        load_named(name, f"callbacks.{moment}")(*arguments)
    except Exception as error:  # noqa: BLE001 - hours of training do not end by a notification that failed
        report("callback", f"callbacks.{moment} {name} failed: {type(error).__name__}: {first_line(error)}")
