"""An exported model as MLflow's `pyfunc`: `mlflow.pyfunc.load_model` imports this module by its name and calls `_load_pyfunc`.

Invariant: it answers as the evaluation does: the run's prompt form, greedy, the exported lambda and space. Imported by MLflow in a
process that has nothing but the model's folder; `describe` is called by `run.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tc_ray
from tc_ray.config.fusion import FusionSection
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.export.check import ExportError, read_part
from tc_ray.models.folder import COPILOT, FUSION_FILE, PILOT, FusionSettings
from tc_ray.models.identity import model_identity

LOADER = __name__
EXPORT, REFERENCE = "export", "export.json"
"""In the folder of the MLflow model: the export, or a file that names its folder and version."""
PROMPT, COMPLETION = "prompt", "completion"
"""Columns of input and output."""
BATCH = 16
"""Prompts that are decoded together."""
_PACKAGES = ("torch", "transformers", "safetensors")


def describe(export: Path, config: RunConfig) -> dict[str, Any]:
    """What MLflow keeps of an export beside its files: columns, parameters with their defaults, requirements, version."""
    parameters: dict[str, float | int] = {"max_new_tokens": config.fusion.max_new_tokens}
    if (export / COPILOT).is_dir():
        parameters["lam"] = FusionSettings.read(export).lam
    return {
        "folder": export,
        "version": export_version(export),
        "loader": LOADER,
        "column": PROMPT,
        "answer": COMPLETION,
        "parameters": parameters,
        "requirements": [f"tc-ray=={tc_ray.__version__}", *(f"{name}=={version(name)}" for name in _PACKAGES)],
    }


def export_version(export: Path) -> str:
    """Names of the models' contents, the fusion settings and the length of an answer: another one is another model.

    All of it is read from the folder, so that a process which has nothing else computes the same. Raises ConfigError, and what
    reading a damaged fusion.json does.
    """
    parts = [model_identity(export / part) for part in (PILOT, COPILOT) if (export / part).is_dir()]
    decides = asdict(FusionSettings.read(export))
    decides["max_new_tokens"] = load_saved_config(export / "config.yaml").fusion.max_new_tokens
    return " ".join([*parts, *(f"{name}={value}" for name, value in decides.items())])


class ExportedModel:
    """Pilot and Copilot (or the Pilot alone, where the Copilot failed) as MLflow calls them.

    Args:
        export: folder of an exported run. Raises what loading a damaged one does: NoFusedModelError, WeightsError, ...
        device: "cpu" or "cuda".
    """

    def __init__(self, export: Path, device: str) -> None:
        from tc_ray.evaluation.sources import find_source, load_source, own_form

        source = find_source(str(export))
        self._settings = FusionSettings.read(export)
        self._model, self._tokenizer = load_source(source, self._settings.feedback, device)
        self._form = source.data or own_form(self._tokenizer)
        self._fused = source.copilot is not None

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Completions of prompts.

        Args:
            model_input: pandas DataFrame with a text column `prompt`, one row each.
            params: `max_new_tokens`; `lam`, 0 is the Pilot itself. MLflow gives the run's where the caller gives none.

        Returns: DataFrame with the column `completion`, in the same order and with the same index.
        """
        import pandas

        from tc_ray.data.encode.tokenize import prompt_ids
        from tc_ray.data.source.shapes import Turn
        from tc_ray.evaluation.decode import completions
        from tc_ray.evaluation.rows import HeldOut

        given = {"lam": self._settings.lam, "max_new_tokens": FusionSection().max_new_tokens} | dict(params or {})
        choice = self._settings.space, float(given["lam"]) if self._fused else 0.0
        rows = []
        for number, text in enumerate(model_input[PROMPT]):
            turns = [Turn("user", str(text))]
            ids = prompt_ids(turns, self._form, self._tokenizer, self._model.config.is_encoder_decoder)
            rows.append(HeldOut(number, ids, len(ids), "", str(text)))
        texts: list[str] = []
        for first in range(0, len(rows), BATCH):
            some, limit = rows[first : first + BATCH], int(given["max_new_tokens"])
            found = completions(self._model, self._tokenizer, some, [choice], max_new_tokens=limit)
            texts += [text for (text,) in found]
        return pandas.DataFrame({COMPLETION: texts}, index=model_input.index)


def _load_pyfunc(path: str) -> ExportedModel:
    """MLflow's entry. path: folder of the MLflow model. Raises ExportError: it names an export that is gone, or another by now."""
    import torch

    folder = Path(path)
    export = folder / EXPORT if (folder / EXPORT).is_dir() else _referred(folder)
    return ExportedModel(export, "cuda" if torch.cuda.is_available() else "cpu")


def _referred(folder: Path) -> Path:
    named = read_part(folder / REFERENCE)
    export = Path(named["folder"])
    if not (export / FUSION_FILE).is_file():
        raise ExportError(
            f"{folder} names the export {export}, which is not there: it was too large to be copied (docs/tracking.md). "
            "Load it where that folder is, or log it from there again"
        )
    if export_version(export) != named["version"]:
        raise ExportError(
            f"{folder} names the export {export}, which holds another model by now ({named['version']} then)"
        )
    return export
