"""The MLflow run of a study, which the runs of its cells stand under.

Invariant: it is opened before any cell starts, so that no two processes make the store at once. A cell that is no run of the main
job gets a run of its own with what was measured. Without mlflow among its trackers nothing is done.
"""

from __future__ import annotations

import logging
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.study.cells import Cell
from tc_ray.study.file import Study
from tc_ray.study.results import Result
from tc_ray.text import first_line

log = logging.getLogger(__name__)


class StudyTracking:
    """A context manager. uri, run_id: of the study's MLflow run; None: there is none.

    Raises TrackingError where MLflow cannot be used.
    """

    def __init__(self, study: Study, config: RunConfig) -> None:
        self.uri: str | None = None
        self.run_id: str | None = None
        self._client: Any = None
        if "mlflow" not in config.tracking.targets:
            return
        import ray
        from mlflow import MlflowClient

        from tc_ray.tracking.mlflow_address import resolve_uri
        from tc_ray.tracking.mlflow_writer import open_run
        from tc_ray.tracking.targets import check_one_node

        config = config.model_copy(deep=True)
        config.run.name, config.run.folder = study.file.name, study.folder / "cells"  # the store is made beside it
        # each cell has a Tracker of its own, on the node that it runs on
        check_one_node(resolve_uri(config), sum(node["Alive"] for node in ray.nodes()))
        opened = open_run(config, study.folder)
        self.uri, self.run_id = opened.uri, opened.run_id
        self._client = MlflowClient(tracking_uri=opened.uri)

    def __enter__(self) -> StudyTracking:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._try(lambda: self._client.set_terminated(self.run_id, "FAILED" if kind else "FINISHED"))

    def result(self, cell: Cell, result: Result) -> None:
        """Record what a cell measured."""
        self._try(lambda: self._record(cell, result))

    def _record(self, cell: Cell, result: Result) -> None:
        experiment = self._client.get_run(self.run_id).info.experiment_id
        tags = {"mlflow.parentRunId": self.run_id, "tc_ray.cell": cell.key, "tc_ray.kind": cell.kind}
        made = self._client.create_run(experiment, run_name=f"{cell.name} measured", tags=tags).info.run_id
        for name, model in result.models.items():
            for rows, answers in model.sets.items():
                self._client.log_metric(made, f"{name}/{rows}/{answers.metric}", answers.value)
                if answers.mean_nll is not None:
                    self._client.log_metric(made, f"{name}/{rows}/nll", answers.mean_nll)
        self._client.set_terminated(made, "FINISHED")

    def _try(self, call: Any) -> None:
        """Tracking must not end a study."""
        if self._client is None:
            return
        from tc_ray.tracking.mlflow_address import refused_soon

        try:
            with refused_soon():  # a study must not wait for it either
                call()
        except Exception as error:  # noqa: BLE001 - whatever the store raises
            log.warning("MLflow fails, the study goes on: %s", first_line(error))
