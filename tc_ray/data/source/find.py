"""Which files of a source are read, for which part of the run, and what is left out.

Invariant: each file of a data folder belongs to the training, validation or test rows, or is named as left out. A file that
the user names directly is taken for the part it is named for. Runs in the driver; called by `prepare` and by plans.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tc_ray.config.data import EMBEDDED, DataSection
from tc_ray.data.source.errors import DataError
from tc_ray.text import visible

PARTS = ("train", "validation", "test")
EXAMPLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
SEQUENCE_SUFFIXES = (".txt",)
SIDE_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data files."""
_WORDS = {
    "train": "train training trainset",
    "validation": "eval evaluation evalset validation valid validset val valset dev devset",
    "test": "test testset heldout holdout",
}
_PART_OF_WORD = {word: part for part, words in _WORDS.items() for word in words.split()}
_HELD_OUT = re.compile(r"(?<![^\W_])(held|hold)[\W_]out(?![^\W_])")
_SHOWN_NAMES = 5


@dataclass
class Sources:
    """Files of each part (train without files: the embedded data set), and notes on what was chosen and left out."""

    files: dict[str, list[Path]]
    notes: list[str]


@dataclass
class _Found:
    """Data files of one source by the part in their names ("" without one), and files of other kinds."""

    place: Path
    suffixes: Sequence[str]
    by_part: dict[str, list[Path]] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)

    @property
    def kinds(self) -> str:
        """The kinds of files that are read."""
        return f"{', '.join(self.suffixes)} (or {self.suffixes[0].replace('.json', '.jsonl')}.gz)"

    @property
    def files(self) -> list[Path]:
        return sorted(file for files in self.by_part.values() for file in files)

    def names(self, files: Sequence[Path]) -> str:
        """The first of these names, relative to the folder."""
        names = [visible(file.relative_to(self.place).as_posix()) for file in files[:_SHOWN_NAMES]]
        more = len(files) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")


def find_sources(config: DataSection) -> Sources:
    """Files of every part that has its own; the other parts are cut from train.

    In a folder of training data, a file or folder is test rows if its name holds the word test (testset, heldout), and
    validation rows if it holds eval, validation, valid, val or dev (evalset, ...): see `data.parts`. data.test and
    data.validation override this.

    Raises:
        DataError: files are absent, of no known kind, or named so that their part is not clear.
    """
    files: dict[str, list[Path]] = {part: [] for part in PARTS}
    notes: list[str] = []
    if config.train != EMBEDDED:
        found = _find(config.train, config)
        if not found.files and not found.left_out and config.fallback == EMBEDDED:
            notes.append(f"data.train {found.place} is absent: using the embedded data set")
            if config.validation or config.test:
                notes[0] += ", and cutting validation and test from it too"
            return Sources(files, notes)
        files = _parts_of_train(found, config, notes)
    for part in ("validation", "test"):
        source = getattr(config, part)
        if source:
            files[part] = part_files(source, part, config, notes)
    return Sources(files, notes)


def part_files(source: str, part: str, config: DataSection, notes: list[str]) -> list[Path]:
    """Files of `source` (file or folder) for "validation" or "test": those named so, else those without a part."""
    found = _find(source, config)
    files = found.by_part.get(part) or found.by_part.get("", [])
    if not files:
        raise _nothing(found, part, config)
    others = [file for file in found.files if file not in files]
    if others:
        notes.append(f"data.{part}: left out of {found.place} by their names: {found.names(others)}")
    _note_left_out(found, notes)
    return files


def is_absent(config: DataSection) -> bool:
    """There is nothing at data.train, so a run falls back (data.fallback) or refuses."""
    if config.train == EMBEDDED:
        return False
    found = _find(config.train, config)
    return not found.files and not found.left_out


def _parts_of_train(found: _Found, config: DataSection, notes: list[str]) -> dict[str, list[Path]]:
    held_out = {part: found.by_part.get(part, []) for part in ("validation", "test")}
    files = {"train": sorted(found.by_part.get("", []) + found.by_part.get("train", [])), **held_out}
    named = [file for part in held_out.values() for file in part]
    if not files["train"]:
        if named:
            other = f", and these files are not read: {found.names(found.left_out)}" if found.left_out else ""
            raise DataError(
                f"data.train: every data file in {found.place} is held out by its name ({found.names(named)}){other}; "
                f"{'convert them, ' if other else ''}name the file itself, or set data.parts=all_train"
            )
        raise _nothing(found, "train", config)
    if named and config.format == "sequences":
        raise DataError(
            f"data.train: {found.place} holds {found.names(named)} beside other files, but format: sequences holds out "
            "the last items of each user; name the file itself, or set data.parts=all_train"
        )
    for part, own in held_out.items():
        if own and getattr(config, part):
            notes.append(f"left out of {found.place}, because data.{part} is set: {found.names(own)}")
            files[part] = []
        elif own:
            notes.append(
                f"{part} rows by their names: {found.names(own)} (in {found.place}; data.parts=all_train trains on them)"
            )
    _note_left_out(found, notes)
    return files


def _find(source: str, config: DataSection) -> _Found:
    """Data files of a source. Raises DataError for a file of another kind."""
    place = Path(source).expanduser().absolute()
    found = _Found(place, SEQUENCE_SUFFIXES if config.format == "sequences" else EXAMPLE_SUFFIXES)
    if place.is_file():
        if not _is_data(place, found.suffixes):
            raise DataError(f"{place}: unknown kind of file; convert it to one of {found.kinds}")
        _check_name(place)
        found.by_part[""] = [place]
        return found
    for file in sorted(place.rglob("*")) if place.is_dir() else ():
        relative = file.relative_to(place)
        if not file.is_file():
            if file.is_symlink():  # to a folder, which is not read, or to nothing
                found.left_out.append(file)
            continue
        is_data = _is_data(file, found.suffixes)
        hidden = any(part.startswith((".", "_")) for part in relative.parts)
        if hidden or not is_data or file.name.lower() in SIDE_FILES:
            if is_data or not hidden:
                found.left_out.append(file)
        else:
            _check_name(file)
            part = "" if config.parts == "all_train" else _part_by_name(relative, place)
            found.by_part.setdefault(part, []).append(file)
    return found


def _check_name(file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise DataError(f"{visible(str(file))}: the name is not valid UTF-8; rename the file") from None


def _part_by_name(file: Path, folder: Path) -> str:
    """The part whose word stands in the file's name, else in the name of the nearest folder; "" without one."""
    for name in reversed(file.parts):
        parts = {
            _PART_OF_WORD[word]
            for word in re.split(r"[\W\d_]+", _HELD_OUT.sub(r"\1out", name.lower()))
            if word in _PART_OF_WORD
        }
        if len(parts) > 1:
            raise DataError(
                f"{folder / file}: its name {name} holds the words of {' and '.join(sorted(parts))} rows; rename it, "
                "name each file in data.train, data.validation and data.test, or set data.parts=all_train"
            )
        if parts:
            return parts.pop()
    return ""


def _is_data(file: Path, suffixes: Sequence[str]) -> bool:
    name = file.name.lower()
    texts = [suffix for suffix in suffixes if suffix != ".parquet"]  # Parquet is compressed inside
    return name.endswith((*suffixes, *(f"{suffix}.gz" for suffix in texts)))


def _note_left_out(found: _Found, notes: list[str]) -> None:
    if found.left_out:
        notes.append(f"left out of {found.place}: {found.names(found.left_out)}; files that are read: {found.kinds}")


def _nothing(found: _Found, part: str, config: DataSection) -> DataError:
    kinds = ".txt" if config.format == "sequences" else ".json, .jsonl or .parquet"
    if found.files or found.left_out:
        other = found.names(found.left_out or found.files)
        return DataError(
            f"data.{part}: {found.place} holds no {kinds} file of {part} rows, only {other}; convert or rename"
        )
    hint = "; or set data.train=embedded, or data.fallback=embedded" if part == "train" else ""
    return DataError(
        f"data.{part}: no {kinds} file at {found.place}; "
        f"correct the path (relative paths start at the current folder){hint}"
    )
