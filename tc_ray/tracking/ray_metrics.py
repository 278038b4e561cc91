"""The newest metrics of a run as gauges of Ray, for its Prometheus endpoint and Grafana.

A metric NAME of the Pilot, the Copilot or the log is `ray_tc_ray_pilot_NAME` and so on there, with the run's name as label
`run`. Invariant: outside Ray nothing happens. Used by tracker.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from tc_ray.tracking.points import plain_numbers


class RayMetrics:
    """Gauges of one run, made as its metrics come."""

    def __init__(self, run: str) -> None:
        self._labels = {"run": run}
        self._gauges: dict[str, Any] = {}

    def set(self, kind: str, metrics: Mapping[str, Any]) -> None:
        """Export the metrics of a point. kind: pilot, copilot or log. Numbers that are not finite, and None, are left out."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        present = {name: value for name, value in metrics.items() if value is not None}
        for name, value in plain_numbers(present).items():
            full = re.sub(r"\W", "_", f"tc_ray_{kind}_{name}", flags=re.ASCII)
            if full not in self._gauges:
                self._gauges[full] = Gauge(full, f"{name} of the {kind}", ("run",))
            self._gauges[full].set(value, self._labels)
