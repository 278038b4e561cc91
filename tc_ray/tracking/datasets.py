"""The rows of a run as MLflow's dataset inputs: name, digest, where they came from, how many."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from tc_ray.config.redact import redact_address

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

NAME_CHARACTERS = 100
Context = Literal["training", "validation", "testing"]


@dataclass(frozen=True)
class UsedRows:
    """One part of a run's rows. digest: the hash of their content. source: file, address or words. rows: their number."""

    context: Context
    digest: str
    source: str
    rows: int


def dataset_inputs(used: Sequence[UsedRows]) -> list[DatasetInput]:
    """What MLflow's `log_inputs` takes; the same rows again are the same datasets. Sources are without secrets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for rows in used:
        source = redact_address(rows.source)
        kind, where = _source(source)
        stem = re.sub(r"[^\w.-]+", "-", PurePosixPath(source).stem)[:NAME_CHARACTERS]
        profile = json.dumps({"num_rows": rows.rows})
        dataset = Dataset(f"{stem} {rows.context}", rows.digest, kind, where, profile=profile)
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", rows.context)]))
    return found


def _source(text: str) -> tuple[str, str]:
    """MLflow's type and JSON of a source: a file, an object store, a page; what is none of these is kept as a tag."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.exceptions import MlflowException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two of its resolvers take a local file, and find the same
            source = resolve_dataset_source(text)
    except MlflowException:
        source = CodeDatasetSource({"tc_ray.source": text})
    return source._get_source_type(), source.to_json()
