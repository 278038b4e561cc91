"""Small files and published folders: old or new, never a part; whole only with every byte there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tc_ray.files import FOLDER_MARKER, is_whole, publish_folder, write_file, write_json


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the synced and renamed files, in order."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watched(real, word, name):  # type: ignore[no-untyped-def]
        def call(*args: object) -> object:
            seen.append(f"{word} {name(*args)}")
            return real(*args)

        return call

    monkeypatch.setattr(
        os, "fsync", watched(fsync, "sync", lambda handle: Path(f"/proc/self/fd/{handle}").readlink().name)
    )
    monkeypatch.setattr(os, "replace", watched(replace, "rename", lambda _, new: Path(new).name))
    monkeypatch.setattr(os, "rename", watched(rename, "rename", lambda _, new: Path(new).name))
    return seen


def test_a_file_is_synced_before_its_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4: a rename may reach the disk before the bytes do, which leaves an empty file after a power cut."""
    seen = calls_of(monkeypatch)
    write_json(tmp_path / "a.json", {"x": 1})
    assert len(seen) == 3
    assert seen[0].startswith("sync .a.json")
    assert seen[1:] == ["rename a.json", f"sync {tmp_path.name}"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_published_folder_is_whole_until_any_file_in_it_is_torn(tmp_path: Path) -> None:
    """Fault 7: a half-written folder with a config.json counted as done."""
    temporary, folder = tmp_path / "final.tmp", tmp_path / "final"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "config.json").write_text("{}")
    (temporary / "inner" / "weights").write_bytes(b"12345")
    assert not is_whole(temporary)
    publish_folder(temporary, folder)
    assert is_whole(folder) and not temporary.exists()
    for name in ("config.json", "inner/weights", FOLDER_MARKER):
        content = (folder / name).read_bytes()
        for length in range(len(content) - 1):
            (folder / name).write_bytes(content[:length])
            assert not is_whole(folder), f"{name} cut after {length} bytes"
        (folder / name).unlink()
        assert not is_whole(folder), f"{name} removed"
        (folder / name).write_bytes(content)
        assert is_whole(folder)


@pytest.mark.parametrize("marker", ["", "null", "[]", "{}", '{"files": null}', '{"files": {"a": 1}}', "\x00" * 40])
def test_a_damaged_marker_is_none(tmp_path: Path, marker: str) -> None:
    (tmp_path / FOLDER_MARKER).write_text(marker)
    assert not is_whole(tmp_path)


def test_publishing_replaces_an_older_folder(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a").write_text(content)
        publish_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "two" and is_whole(tmp_path / "final")
