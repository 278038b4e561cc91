"""The tests of what needs a package that tc-ray does not bring, where it is installed; in the usual environment they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.other_clients import installed, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("package", "tests"), [("bitsandbytes", "pilot/test_quantization.py"), ("datasets", "data/test_hub.py")]
)
def test_with_the_package_all_of_them_run(package: str, tests: str, tmp_path: Path) -> None:
    python = installed(tmp_path / "venv", package)
    done = run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/unit/{tests}", folder=ROOT, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]
