"""Programs that others wrote, each in an environment of its own: their dependencies are no business of tc-ray's.

What the environment of the tests has already (torch above all) is found there and not fetched again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PYTHON = {
    "openai": "3.52.0",
    "litellm": "1.110.2",
    "langchain-openai": "1.7.4",
    "instructor": "1.17.0",
    "llm": "0.36",
    "lm-eval": "0.4.13",
    "guidellm": "0.8.1",
}
"""Clients and the versions that docs/serving.md says were tried."""
OPTIONAL = {"bitsandbytes": "0.50.2", "datasets": "5.2.0"}
"""Packages that a user adds to tc-ray for one thing that it can do."""
NODE = {"openai": "7.59.0", "ai": "7.0.173", "@ai-sdk/openai-compatible": "3.0.92", "zod": "4.6.7"}


def run(*command: str | Path, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; variables: added to its environment."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def installed(folder: Path, name: str, extra: str = "") -> Path:
    """Interpreter of a new environment in `folder` with a package of PYTHON or OPTIONAL. Skips the test where no registry has it."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    asked = f"{name}{extra}=={(PYTHON | OPTIONAL)[name]}"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    done = run(*pip, "install", "-q", "--no-warn-conflicts", asked)
    if done.returncode:
        pytest.skip(f"{asked} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python
