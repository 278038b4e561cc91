"""Errors that pass by themselves: which they are, and who waits for their end."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.table import errors as retry_module
from tc_ray.mistakelog.table.errors import LogFullError, may_pass, retry
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tests.unit.mistakelog.test_compaction import ROWS, written


def test_which_errors_pass() -> None:
    assert may_pass(OSError(errno.ENOSPC, "x")) and may_pass(OSError(errno.EDQUOT, "x"))
    assert may_pass(LogFullError("x")) and may_pass(ConnectionResetError()) and may_pass(TimeoutError())
    assert may_pass(OSError("Generic S3 error: error sending request for url (http://here/)"))
    assert may_pass(OSError("Generic S3 error: 503 Service Unavailable"))
    assert not may_pass(PermissionError(errno.EACCES, "connection"))
    assert not may_pass(FileNotFoundError(errno.ENOENT, "x"))
    assert not may_pass(OSError(errno.EIO, "Input/output error, no space left"))
    assert not may_pass(ValueError("no space left"))
    assert not may_pass(OSError("Generic S3 error: 403 Forbidden"))


def test_what_passes_is_waited_for_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry_module.time, "sleep", pauses.append)
    errors: list[OSError] = [TimeoutError("no answer") for _ in range(7)]

    def act() -> str:
        if errors:
            raise errors.pop()
        return "there"

    assert retry(act, "Copilot 0") == "there"
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert caplog.text.count("Copilot 0: the log is out of reach (no answer)") == 1
    errors.append(PermissionError(errno.EACCES, "x"))
    with pytest.raises(PermissionError):
        retry(act, "Copilot 0")


def test_a_ledger_that_is_restarted_while_the_log_cannot_be_read_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives an actor up whose start fails."""
    written(tmp_path)
    real, tries = LogStore.__init__, []

    def unreachable(store: LogStore, location: Location, lease: int | None = None) -> None:
        if location == tmp_path:  # the lease thread of another test's log may look at its own
            tries.append(location)
            if len(tries) < 3:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        real(store, location, lease=lease)

    monkeypatch.setattr(LogStore, "__init__", unreachable)
    ledger = LedgerActor(tmp_path, writers=1, run="test")
    assert len(tries) == 3 and ledger.state().rows == 8 * ROWS


@pytest.mark.parametrize("error", [OSError("Generic S3 error: 503"), DeltaError("x")])
def test_a_checkpoint_of_the_table_that_fails_does_not_fail_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    written(tmp_path)

    def fail(_: DeltaTable) -> None:
        raise error

    monkeypatch.setattr("tc_ray.mistakelog.table.store._CHECKPOINT_COMMITS", 1)
    monkeypatch.setattr(DeltaTable, "create_checkpoint", fail)
    store = LogStore(tmp_path)
    assert store.commit(numbers={"x": 1}) == store.version
    assert "no checkpoint of the table at version" in caplog.text
