"""Write the fused model: one folder with both models, the tokenizer, the fusion settings and where it all came from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import tc_ray
from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.report import Report
from tc_ray.models.fusion import write_settings

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "peft", "deltalake")


def export_fused(config: RunConfig, report: Report, *, rounds: int) -> Path:
    """Assemble `export/` from `pilot/final` and `copilot/final`; it appears whole, by a rename. Returns the folder.

    Where the report knows of no Copilot the export has none either: `pilot/` alone, and lambda 0.
    """
    run = config.run.path
    temporary, target = run / "export.tmp", run / "export"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shutil.copytree(run / "pilot" / "final", temporary / "pilot")
    if report.no_copilot is None:
        shutil.copytree(run / "copilot" / "final", temporary / "copilot")
    write_settings(temporary, lam=report.exported_lam, space=report.space, feedback=report.feedback)
    save_config(config, temporary / "config.yaml")
    provenance = {
        "tc_ray": tc_ray.__version__,
        "run": config.run.name,
        "pilot": config.model.pilot,
        "rounds": rounds,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": sys.argv,
        "verdict": report.verdict,
    }
    (temporary / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    return target
