"""MLflow's store for tests: its tables are made once a process, which takes seconds, and copied for each test."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mlflow import MlflowClient


@cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tc-ray-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


def new_store(folder: Path) -> None:
    """An empty store in `folder`, where a run in `folder`/NAME looks for it by default."""
    shutil.copyfile(_made(), folder / "mlflow.db")
