"""What the tests of serving share."""

from __future__ import annotations

import pytest

from tests.support.recorded_metrics import RecordedMetrics


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedMetrics:
    """Metrics recorded in this test."""
    return RecordedMetrics(monkeypatch)
