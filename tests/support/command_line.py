"""`tc-ray` as a user runs it: in this process, or in one of its own where that matters (it takes some seconds to start)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tc_ray.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def tc_ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command here; its exit code and both outputs, neither of them a terminal."""
    words = [str(argument) for argument in arguments]
    out, error, code = io.StringIO(), io.StringIO(), 0
    factory = logging.getLogRecordFactory()
    with (
        mock.patch.object(sys, "argv", ["tc-ray", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logging.setLogRecordFactory(factory)
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


def tc_ray_process(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; `environment`: further variables."""
    return subprocess.run(
        [sys.executable, "-m", "tc_ray.cli.main", *map(str, arguments)],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
