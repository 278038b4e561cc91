"""Overrides and storage options are given once; what `train-copilot` prints beside its loss is of the same kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.load import load_config
from tc_ray.config.yaml_file import ConfigError
from tc_ray.copilot.from_log import TrainedCopilot
from tc_ray.inspection.source import find_log

ROOT = Path(__file__).parents[3]


def test_the_job_script_refuses_a_second_recipe() -> None:
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--config", "a.yaml", "--config", "b.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "--config is given twice" in done.stderr


def test_an_override_and_a_storage_option_are_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pilot\.epochs replaces an earlier one"):
        load_config(None, ["pilot.epochs=1", "data.seed=1", "pilot.epochs=2"])
    with pytest.raises(ValueError, match="--storage-option: give each KEY once"):
        find_log("s3://bucket/log", ["region=a", "key=b", "region=c"])


NOTHING: dict[str, Any] = {"ratios": [], "bad_files": 0, "left_out_steps": 0}


def test_no_rmse_is_set_beside_another_loss() -> None:
    """Fault 14: with `copilot.loss=kl` the RMSE of no correction stood beside a KL value as if they could be compared."""
    rmse = TrainedCopilot(Path("a"), 3, loss=0.25, uncorrected=0.5, **NOTHING).lines()[1]
    assert rmse == "loss      0.2500 over the last tenth; 0.5000 without a correction"
    kl = TrainedCopilot(Path("a"), 3, loss=0.001, uncorrected=None, **NOTHING).lines()[1]
    assert kl == "loss      0.0010 over the last tenth"
