"""The exported model in MLflow: logged as `pyfunc` under the run, and put into the registry by name.

Invariant: weights are not stored twice on one disk (`_placing`), and the same export is logged and registered once, however often
its run is started. Called in `mlflow_writer`'s thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from tc_ray.files import write_json

NAME = "fused"
"""Of the logged model, under its run."""
VERSION_TAG, PLACED_TAG = "tc_ray.version", "tc_ray.weights"
LARGEST_COPY = 2 * 1024**3
"""Bytes of an export that are copied to a store. Of a larger one MLflow gets the folder's name: a run does not end in an upload of
many minutes that nobody asked for."""
EXPORT, REFERENCE = "export", "export.json"
Placing = Literal["linked", "copied", "named"]


@dataclass(frozen=True)
class ModelToLog:
    """An export as MLflow is to have it.

    version: another one is another model. loader: module with `_load_pyfunc`. column, answer: of its input and output.
    parameters: with their defaults. example: one input. folder, for MLflow's own files: absolute, on the Tracker's node.
    """

    folder: Path
    version: str
    loader: str
    column: str
    answer: str
    parameters: dict[str, float | int]
    requirements: list[str]
    example: str
    register: str | None = field(default=None)


def log_model(client: MlflowClient, run_id: str, model: ModelToLog) -> str:
    """Log the model under the run, register it where it has a name for that, and return its MLflow id."""
    model_id = _known(client, run_id, model) or _new(client, run_id, model)
    if model.register is not None:
        _register(client, run_id, model.register, model_id)
    return model_id


def _known(client: MlflowClient, run_id: str, model: ModelToLog) -> str | None:
    """Id of the same model under the run, from an earlier start. One that was deleted since is logged anew."""
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else ():
        try:
            found = client.get_logged_model(output.model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if found.tags.get(VERSION_TAG) == model.version and found.status == LoggedModelStatus.READY:
            return str(found.model_id)
    return None


def _new(client: MlflowClient, run_id: str, model: ModelToLog) -> str:
    experiment = client.get_run(run_id).info.experiment_id
    made = client.create_logged_model(experiment, NAME, source_run_id=run_id, tags={VERSION_TAG: model.version})
    model_id, status = str(made.model_id), LoggedModelStatus.FAILED
    try:
        placing = _placing(model.folder, made.artifact_location)
        client.set_logged_model_tags(model_id, {PLACED_TAG: placing})
        with tempfile.TemporaryDirectory() as temporary:
            described = Path(temporary) / "model"
            _describe(described, run_id, made, model)
            if placing == "named":
                write_json(described / REFERENCE, {"folder": str(model.folder), "version": model.version})
            client.log_model_artifacts(model_id, str(described))
        if placing == "linked":
            target = Path(local_file_uri_to_path(made.artifact_location)) / EXPORT
            shutil.copytree(model.folder, target, copy_function=_link)
        elif placing == "copied":
            client.log_model_artifacts(model_id, str(model.folder), EXPORT)
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return model_id


def _placing(folder: Path, location: str) -> Placing:
    """How the store gets the weights. On the run's own disk as hard links, which take no room and outlive the run's folder."""
    if location.startswith(("file:", "/")):
        store = Path(local_file_uri_to_path(location))
        there = next(place for place in (store, *store.parents) if place.exists())
        if there.stat().st_dev == folder.stat().st_dev:
            return "linked"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return "copied" if size <= LARGEST_COPY else "named"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _describe(path: Path, run_id: str, made: Any, model: ModelToLog) -> None:
    """Write MLflow's own files: MLmodel with signature and example, requirements."""
    import mlflow.pyfunc
    import pandas
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {int: DataType.long, float: DataType.double}
    parameters = [ParamSpec(name, kinds[type(value)], value) for name, value in model.parameters.items()]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, model.column)]),
        outputs=Schema([ColSpec(DataType.string, model.answer)]),
        params=ParamSchema(parameters),
    )
    identity = {"model_uuid": made.model_id, "model_id": made.model_id}
    mlflow.pyfunc.save_model(
        path=str(path),
        loader_module=model.loader,
        mlflow_model=Model(artifact_path=made.artifact_location, run_id=run_id, **identity),
        signature=signature,
        input_example=pandas.DataFrame({model.column: [model.example]}),
        pip_requirements=model.requirements,
    )


def _register(client: MlflowClient, run_id: str, name: str, model_id: str) -> None:
    """A new version of `name` in the registry, unless it has this model."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    # not `models:/ID`: a store in this process looks that up in the process's own tracking address
    source = client.get_logged_model(model_id).artifact_location
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == name and version.source == source:
            return
    client.create_model_version(name, source, run_id=run_id, model_id=model_id)
