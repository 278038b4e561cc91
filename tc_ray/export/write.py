"""Write the export of a run: both models, the tokenizer, the fusion settings, where all of it came from, and a model card."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tc_ray
from tc_ray.config.load import save_config
from tc_ray.config.redact import redact_override
from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.report import Report
from tc_ray.export.card import CardSource, write_card
from tc_ray.export.check import PROVENANCE_FILE
from tc_ray.files import FOLDER_MARKER, finite, publish_folder, read_json, write_json
from tc_ray.models.folder import COPILOT, PILOT, FusionSettings

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "peft", "deltalake")


def export_fused(config: RunConfig, report: Report, *, rounds: int) -> Path:
    """Assemble `export/` from `pilot/final` and `copilot/final`; it appears whole, by a rename. Returns the folder.

    If the report has no Copilot the export has none either: `pilot/` alone, and lambda 0.
    """
    run = config.run.path
    temporary, target = run / "export.tmp", run / "export"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    verdict = report.first
    for part in (PILOT, COPILOT) if verdict.no_copilot is None else (PILOT,):
        # its marker stays behind: that of the export names all files
        shutil.copytree(run / part / "final", temporary / part, ignore=shutil.ignore_patterns(FOLDER_MARKER))
    fusion = FusionSettings(verdict.exported_lam, verdict.chosen.space, verdict.chosen.feedback)
    fusion.write(temporary)
    save_config(config, temporary / "config.yaml")
    weights = read_json(run / PILOT / "final" / FOLDER_MARKER).get("round", rounds)
    of_run = {"run": config.run.name, "pilot": config.model.pilot, "rounds": rounds}
    of_run |= {"pilot_round": weights, "verdict": str(verdict)}
    write_provenance(temporary, of_run, PACKAGES)
    measured = finite(report.to_dict())
    write_card(temporary, "fused", CardSource.of_run(run, config, temporary / PILOT, report=measured, fusion=fusion))
    publish_folder(temporary, target)
    return target


def write_provenance(folder: Path, made_of: dict[str, Any], packages: Sequence[str]) -> None:
    """Write provenance.json: what the export was made of, with which versions of `packages`, by which command."""
    made_by = {
        "tc_ray": tc_ray.__version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "command": [redact_override(word) for word in sys.argv],
    }
    write_json(folder / PROVENANCE_FILE, made_of | made_by)
