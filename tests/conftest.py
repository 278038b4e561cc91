"""Shared by all tests: quiet, small, independent of the caller's environment."""

from __future__ import annotations

import os

import pytest

# Before torch or ray are imported anywhere: two cores are shared by every process of a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _no_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking server or a cluster of the person who runs the tests must not be used by them."""
    mlflow = [name for name in os.environ if name.startswith("MLFLOW_")]
    for name in (*mlflow, "RAY_ADDRESS", "TC_RAY_DEBUG"):
        monkeypatch.delenv(name, raising=False)
