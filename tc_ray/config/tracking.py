"""Where the measurements of a run go: the `tracking` section."""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import Field, model_validator

from tc_ray.config.section import Section

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
"""Environment variable of MLflow that stands in for `tracking.uri`."""

with warnings.catch_warnings():
    # of `register`, which the metaclass of all models has as well, and no model
    warnings.filterwarnings("ignore", message="Field name .register. .* shadows an attribute")

    class TrackingSection(Section):
        """MLflow, TensorBoard, Weights & Biases."""

        enabled: bool = Field(True, description="send metrics, config and results to the trackers of tracking.to")
        to: list[Literal["mlflow", "tensorboard", "wandb"]] = Field(
            ["mlflow"], description="trackers; tensorboard and wandb need their package"
        )
        uri: str | None = Field(None, description="default MLFLOW_TRACKING_URI, else sqlite in the run folder's parent")
        experiment: str | None = Field(
            None, description="MLflow experiment; default MLFLOW_EXPERIMENT_NAME, else tc-ray"
        )
        log_model: bool = Field(
            True,
            description="log the exported model to MLflow, as a pyfunc model",
        )
        register: str | None = Field(
            None,
            pattern=r"^[^/:]+$",
            description="name in MLflow's model registry that the logged model becomes a version of",
        )
        parent_run: str | None = Field(
            None, description="id of the MLflow run that this one is shown under (a study sets it)"
        )

        @property
        def targets(self) -> list[str]:
            """The trackers that are used."""
            return list(dict.fromkeys(self.to)) if self.enabled else []

        @model_validator(mode="after")
        def _register_what_is_logged(self) -> TrackingSection:
            if self.register is not None and not (self.log_model and "mlflow" in self.to):
                raise ValueError(
                    f"tracking.register {self.register} needs tracking.log_model, and mlflow in tracking.to"
                )
            return self
