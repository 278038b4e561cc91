"""Fault 15: Pilot checkpoints are pickles; those that another user has put into the run folder are loaded only when told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.run import job
from tc_ray.run.folder import ForeignFolderError, check_owner

CHECKPOINT = "pilot/checkpoints/round-000005/state/mp_rank_00_model_states.pt"
OTHER = 54321


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.yaml", CHECKPOINT, "copilot/checkpoints/step-000010/optimizer.pt", "data/train.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("run: {name: trial}\n")
    return tmp_path


def test_a_folder_of_ones_own_and_a_new_one_are_gone_on_with(folder: Path, tmp_path: Path) -> None:
    """Control of fault 15, and nothing is left by the look."""
    before = sorted(folder.iterdir())
    check_owner(folder, trusted=False)
    assert sorted(folder.iterdir()) == before
    (tmp_path / "new").mkdir()
    check_owner(tmp_path / "new", trusted=False, own=OTHER)  # nothing of it would be loaded


def test_files_of_another_user_are_refused_unless_told(folder: Path) -> None:
    """Fault 15: the message names file, owner and setting."""
    with pytest.raises(ForeignFolderError, match=r"config\.yaml belongs to .*run\.trust_folder=true"):
        check_owner(folder, trusted=False, own=OTHER)
    check_owner(folder, trusted=True, own=OTHER)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [CHECKPOINT, "pilot/checkpoints/round-000005", "config.yaml"])
def test_one_file_that_another_user_has_put_there_is_found(name: str, folder: Path) -> None:
    """Fault 15: also a folder in between, whose owner can exchange what is in it; the job stops there, before it reads a byte."""
    os.chown(folder / name, OTHER, -1)
    with pytest.raises(ForeignFolderError, match=rf"{name} belongs to uid {OTHER}, .* pickle"):
        check_owner(folder, trusted=False)
    config = RunConfig.model_validate({"run": {"folder": folder}})
    with pytest.raises(ForeignFolderError):
        job.run_job(config)
    os.chown(folder / name, 0, -1)
    check_owner(folder, trusted=False)
