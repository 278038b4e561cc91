"""Metrics that this process records, caught before Ray exports them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from ray.util import metrics


class RecordedMetrics:
    """What was recorded since: of counters the sum, of histograms the number of values, of gauges the last one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._values: defaultdict[tuple[str, frozenset[tuple[str, str]]], float] = defaultdict(float)
        monkeypatch.setattr(metrics.Metric, "_record", lambda *given, **tags: self._record(*given, **tags))

    def _record(self, metric: metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        assert set(tags or ()) == set(metric.info["tag_keys"]), metric.info
        place = metric.info["name"], frozenset((tags or {}).items())
        if isinstance(metric, metrics.Gauge):
            self._values[place] = value
        else:
            self._values[place] += 1 if isinstance(metric, metrics.Histogram) else value

    def __call__(self, name: str, **labels: str) -> float:
        """The value of one metric; 0 where nothing was recorded."""
        return self._values[name, frozenset(labels.items())]

    def names(self) -> set[str]:
        """Metrics with a value."""
        return {name for name, _ in self._values}

    def labels(self) -> set[Any]:
        """Every label's value."""
        return {value for _, labels in self._values for _, value in labels}
