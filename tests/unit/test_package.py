"""What a package index shows of the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_index_page_is_the_readme_without_links_that_lead_nowhere(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tc_ray/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "import setuptools.build_meta as build; print(build.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    [found] = tmp_path.glob("*.dist-info/METADATA")
    page = message_from_string(found.read_text(encoding="utf-8"))
    text = page.get_payload()
    assert isinstance(text, str), done.stdout
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    assert page["Description-Content-Type"] == "text/markdown"
    assert "run/job.py (the story of a run)" in text and "make demo" in text
