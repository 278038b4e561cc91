"""What `ray job submit --working-dir .` uploads."""

from __future__ import annotations

import logging
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel

ROOT = Path(__file__).resolve().parents[3]


def test_a_job_has_every_file_of_the_package() -> None:
    """`*.md` in .rayignore left out the template of the evaluation's report, and every submitted run failed at its end."""
    uploaded: set[Path] = set()
    _dir_travel(ROOT, [], uploaded.add, include_gitignore=True, logger=logging.getLogger(__name__))
    files = {path for path in (ROOT / "tc_ray").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert ROOT / "tc_ray" / "evaluation" / "static" / "report.md" in files
    assert files <= uploaded, sorted(files - uploaded)
    assert ROOT / "jobs" / "train.py" in uploaded and ROOT / "README.md" not in uploaded
    folders = {path.relative_to(ROOT).parts[0] for path in uploaded if path.is_file()}
    assert not {"tests", "docs", ".git", ".venv", "outputs"} & folders
