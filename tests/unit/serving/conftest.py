"""What the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.support.recorded_metrics import RecordedMetrics
from tests.support.serving_client import client_of, settings_of
from tests.support.serving_samples import make_export


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedMetrics:
    """Metrics recorded in this test."""
    return RecordedMetrics(monkeypatch)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported run that takes 256 positions."""
    return make_export(tmp_path_factory.mktemp("serving"), positions=256)


@pytest.fixture(scope="module")
def client(export: Path) -> Iterator[TestClient]:
    """A client of the application that serves it, without Ray."""
    with client_of(settings_of(export)) as client:
        yield client
